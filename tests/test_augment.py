"""The augment stage: its parameters, the pipeline it builds, what it measures and draws."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.augment import PREVIEW_DRAWS, apply, augment, measure, write_copies
from tasks.augmentation import AugmentParams, EraserParams, build_augmentation
from tasks.data import load_split
from tasks.errors import NightlyError
from tasks.files import read_json, write_json
from tasks.params import parse_section
from tasks.preview import describe, draw_preview
from tests.chance import noise

NOTHING = AugmentParams(shift_pixels=0, eraser=EraserParams(p=0))
EVERYTHING = AugmentParams(
    flip_horizontal=True, flip_vertical=True, shift_pixels=2, eraser=EraserParams(p=0.5, pixel_level=True)
)


def write_prepared(root: Path, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Path:
    train = root / "prepared" / "train"
    train.mkdir(parents=True)
    np.save(train / "images.npy", images)
    np.save(train / "targets.npy", np.eye(len(classes), dtype=np.float32)[labels])
    write_json(root / "prepared" / "classes.json", classes)
    return root / "prepared"


def parse(values: dict) -> AugmentParams:
    return parse_section(values, "augment", AugmentParams, Path("params.yaml"))


def test_defaults_are_safe_for_digits_and_the_erasers_are_the_published_ones():
    params = AugmentParams()
    assert not params.flip_horizontal
    assert not params.flip_vertical
    published = {"s_l": 0.02, "s_h": 0.4, "r_1": 0.3, "r_2": 1 / 0.3, "v_l": 0, "v_h": 255, "pixel_level": False}
    assert params.eraser.model_dump(exclude={"p"}) == published


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eraser": {"p": 1.5}}, "'augment.eraser.p': .*less than or equal to 1, but is 1.5"),
        ({"eraser": {"p": -1}}, "'augment.eraser.p': .*greater than or equal to 0, but is -1"),
        ({"eraser": {"s_l": 0}}, "'augment.eraser.s_l': .*greater than 0, but is 0"),
        ({"eraser": {"s_l": 0.5}}, r"'augment.eraser.s_h': must be at least s_l \(0.5\), but is 0.4"),
        ({"eraser": {"r_1": 4}}, r"'augment.eraser.r_2': must be at least r_1 \(4\)"),
        ({"eraser": {"v_l": 9, "v_h": 8}}, r"'augment.eraser.v_h': must be at least v_l \(9\), but is 8"),
        ({"eraser": {"v_h": 256}}, "'augment.eraser.v_h': .*less than or equal to 255, but is 256"),
        ({"eraser": {"s": 1}}, "unknown key 'augment.eraser.s'"),
        ({"shift_pixels": -1}, "'augment.shift_pixels': .*but is -1"),
        ({"shift_fill": "warp"}, "'augment.shift_fill': .*'edge', 'reflect' or 'constant', but is 'warp'"),
        ({"copies": -1}, "'augment.copies': .*greater than or equal to 0, but is -1"),
        ({"flip_horisontal": True}, "did you mean 'flip_horizontal'"),
    ],
)
def test_wrong_parameters_are_one_clear_line(values, message):
    with pytest.raises(NightlyError, match=message) as caught:
        parse(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("params", [NOTHING, EVERYTHING], ids=["nothing", "everything"])
def test_outside_training_images_stay_as_they_are(params):
    images = noise(6)
    augmentation = build_augmentation(params, images.shape[1:], 0)
    np.testing.assert_array_equal(augmentation(images), images)
    np.testing.assert_array_equal(augmentation(images, training=False), images)


def test_nothing_asked_for_is_the_identity_in_training_too():
    images = noise(6)
    out = np.asarray(build_augmentation(NOTHING, images.shape[1:], 0)(images, training=True))
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, images)


def test_layers_follow_the_parameters():
    from tasks.layers import RandomErasing, RandomFlip, RandomShift

    flip, shift, eraser = build_augmentation(EVERYTHING, (12, 12, 3), 0).layers
    assert (type(flip), type(shift), type(eraser)) == (RandomFlip, RandomShift, RandomErasing)
    assert (flip.horizontal, flip.vertical, shift.pixels, shift.fill) == (True, True, 2, "edge")
    config = eraser.get_config()
    assert {name: config[name] for name in EraserParams.model_fields} == EVERYTHING.eraser.model_dump()
    assert len({flip.seed, shift.seed, eraser.seed}) == 3
    (only,) = build_augmentation(NOTHING.changed(flip_vertical=True), (12, 12, 3), 0).layers
    assert (only.horizontal, only.vertical) == (False, True)


def test_the_seed_decides_and_keras_own_random_state_is_left_alone():
    import keras

    images = noise(32)

    def outcome(seed: int) -> np.ndarray:
        return apply(build_augmentation(EVERYTHING, images.shape[1:], seed), images)

    keras.utils.set_random_seed(1)
    expected = np.asarray(keras.random.uniform((4,)))
    keras.utils.set_random_seed(1)
    first = outcome(5)
    np.testing.assert_array_equal(keras.random.uniform((4,)), expected)
    np.testing.assert_array_equal(outcome(5), first)
    assert (outcome(6) != first).any()


def test_large_seeds_are_welcome():
    build_augmentation(EVERYTHING, (12, 12, 3), 2**40)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (NOTHING.changed(shift_pixels=8), "augment.shift_pixels must be below the image's 8 pixels, but is 8"),
        (
            AugmentParams(eraser=EraserParams(s_l=0.9, s_h=1, r_1=4, r_2=5)),
            "augment.eraser: no rectangle fits into an image of 8 x 20 pixels",
        ),
    ],
)
def test_parameters_must_suit_the_image_size(params, message):
    with pytest.raises(NightlyError, match=message):
        build_augmentation(params, (8, 20, 3), 0)


def test_statistics_are_those_of_the_pixels():
    images, augmented = noise(50), noise(50) // 3
    summary = measure(NOTHING, images, augmented)
    for key, pixels in (("before", images), ("after", augmented)):
        np.testing.assert_allclose(summary[key]["mean"], pixels.mean(axis=(0, 1, 2)), atol=1e-3)
        np.testing.assert_allclose(summary[key]["std"], pixels.std(axis=(0, 1, 2)), atol=1e-3)
    assert summary["eraser"] == {"erased_fraction": 0.0, "mean_erased_area": 0.0}
    assert measure(NOTHING, images, images)["changed_fraction"] == 0


@pytest.mark.parametrize("value", [0, 255, 77])
def test_erased_area_is_seen_whatever_it_is_filled_with(value):
    one_size = EraserParams(p=1, s_l=0.25, s_h=0.25, r_1=1, r_2=1, v_l=value, v_h=value)
    images = np.full((40, 8, 8, 3), value, np.uint8)
    summary = measure(NOTHING.changed(eraser=one_size), images, images)
    assert summary["eraser"] == {"erased_fraction": 1.0, "mean_erased_area": 0.25}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """One run of the stage: 300 images of 12 classes, the last one without a training image."""
    root = tmp_path_factory.mktemp("stage")
    classes = [f"class {index}" for index in range(12)]
    prepared = write_prepared(root, noise(300), np.arange(300) % 11, classes)
    params = AugmentParams(eraser=EraserParams(p=0.5, s_l=0.1))
    out, preview = root / "augmented", root / "preview.png"
    return prepared, out, preview, params, augment(prepared, out, preview, params)


def test_stage_measures_the_sample(stage):
    prepared, out, _, _, result = stage
    summary = read_json(out / "summary.json")
    assert summary["images"] == result.images == 300
    assert summary["image_shape"] == [12, 12, 3]
    assert result.erased_fraction == summary["eraser"]["erased_fraction"]
    assert abs(result.erased_fraction - 0.5) < 4 * np.sqrt(0.25 / 300)
    assert 0.1 < summary["eraser"]["mean_erased_area"] < 0.4
    assert result.images_per_second > 0
    images = np.load(prepared / "train" / "images.npy")
    np.testing.assert_allclose(summary["before"]["mean"], images.mean(axis=(0, 1, 2)), atol=1e-3)


def test_stage_gives_the_same_bytes_again(stage, tmp_path):
    prepared, out, preview, params, _ = stage
    augment(prepared, tmp_path / "augmented", tmp_path / "again.png", params)
    # Training depends on all of it: no picture in there.
    assert [path.name for path in out.iterdir()] == ["summary.json"]
    assert (tmp_path / "augmented" / "summary.json").read_bytes() == (out / "summary.json").read_bytes()
    assert (tmp_path / "again.png").read_bytes() == preview.read_bytes()


def test_no_copies_unless_asked_for(stage):
    _, out, _, _, result = stage
    assert (result.copied_images, result.copied_bytes) == (0, 0)
    assert read_json(out / "summary.json")["copies"] == {"images": 0, "bytes": 0}


def test_copies_follow_each_other_and_are_drawn_anew(tmp_path):
    # 300 images: more than two batches, the last one short.
    images, labels = noise(300), np.arange(300) % 3
    prepared = write_prepared(tmp_path, images, labels, ["a", "b", "c"])
    params = NOTHING.changed(flip_horizontal=True, copies=2)
    result = augment(prepared, tmp_path / "augmented", tmp_path / "preview.png", params)
    copies = np.load(tmp_path / "augmented" / "images.npy", mmap_mode="r")
    targets = np.load(tmp_path / "augmented" / "targets.npy")
    assert (copies.dtype, copies.shape) == (np.uint8, (600, 12, 12, 3))
    assert (targets.dtype, targets.shape) == (np.float32, (600, 3))
    assert (result.copied_images, result.copied_bytes) == (600, copies.nbytes)
    assert read_json(tmp_path / "augmented" / "summary.json")["copies"] == {"images": 600, "bytes": copies.nbytes}
    flipped = []
    for k in range(2):
        for i in range(300):
            copy = copies[k * 300 + i]
            flipped.append((copy == images[i, :, ::-1]).all())
            assert flipped[-1] or (copy == images[i]).all()
            assert targets[k * 300 + i].argmax() == labels[i]
    assert abs(np.mean(flipped) - 0.5) < 4 * np.sqrt(0.25 / 600)
    assert flipped[:300] != flipped[300:]


def test_the_seed_decides_on_the_copies(tmp_path):
    prepared = write_prepared(tmp_path, noise(40), np.arange(40) % 2, ["a", "b"])
    params = EVERYTHING.changed(copies=1)
    found = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        write_copies(params, load_split(prepared, "train"), tmp_path / name, seed)
        found.append((tmp_path / name / "images.npy").read_bytes())
    assert found[0] == found[1] != found[2]


def test_preview_shows_a_row_per_class_with_the_original_enlarged(stage):
    prepared, _, preview, _, _ = stage
    sheet = read_png(preview)
    images = np.load(prepared / "train" / "images.npy")
    found = [place(sheet, enlarged(images[index])) for index in range(11)]
    rows = [at for at in found if at is not None]
    # Ten of the eleven classes that have images, in their order, all in one column.
    assert len(rows) == 10
    assert [at[0] for at in rows] == sorted(at[0] for at in rows)
    assert len({at[1] for at in rows}) == 1


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def enlarged(image: np.ndarray) -> np.ndarray:
    factor = next(factor for factor in range(1, 100) if factor * max(image.shape[:2]) >= 64)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def place(sheet: np.ndarray, tile: np.ndarray) -> tuple[int, int] | None:
    """Return (row, column) of ``tile`` in ``sheet``; tiles of noise occur once."""
    height, width = tile.shape[:2]
    spots = np.argwhere((sheet[: -height + 1, : -width + 1] == tile[0, 0]).all(axis=-1))
    for row, column in spots:
        if (sheet[row : row + height, column : column + width] == tile).all():
            return int(row), int(column)
    return None


def test_draws_of_the_preview_are_all_there(tmp_path):
    tiles = noise(2 * (1 + PREVIEW_DRAWS)).reshape(2, 1 + PREVIEW_DRAWS, 12, 12, 3)
    rows = [(name, tiles[i, 0], tiles[i, 1:]) for i, name in enumerate([r"a $\note$", "名前" * 30])]
    draw_preview(tmp_path / "preview.png", rows, "Augmentation", "words")
    sheet = read_png(tmp_path / "preview.png")
    places = [[place(sheet, enlarged(tile)) for tile in row] for row in tiles]
    assert all(at is not None for row in places for at in row)
    for row in places:
        assert len({at[0] for at in row}) == 1
        assert [at[1] for at in row] == sorted({at[1] for at in row})


def test_large_images_are_shrunk_in_the_preview(tmp_path):
    images = noise(2, 600, 300)
    draw_preview(tmp_path / "preview.png", [("one", images[0], images[1:])], "Augmentation", "words")
    height, width = read_png(tmp_path / "preview.png").shape[:2]
    assert width < 800
    assert height < 300


def test_no_training_images_is_an_error(tmp_path):
    prepared = write_prepared(tmp_path, noise(0), np.zeros(0, int), ["a", "b"])
    with pytest.raises(NightlyError, match="holds no images to augment"):
        augment(prepared, tmp_path / "augmented", tmp_path / "preview.png", AugmentParams())
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_words_say_what_happens():
    assert describe(NOTHING) == "no augmentation: training sees the images as they are"
    words = describe(EVERYTHING)
    assert "flip horizontal and vertical" in words
    assert "shift up to 2 px, repeated edge" in words
    assert "erase 50% of the images, 2% to 40% of the area, noise" in words


MAIN_UNDER_JAX = """
import sys
sys.modules["tensorflow"] = None
from tasks.augment import main
from tasks.errors import run_main
run_main(main)
"""


@pytest.mark.slow
def test_command_under_jax_without_tensorflow(tmp_path):
    prepared = write_prepared(tmp_path, noise(40), np.arange(40) % 2, ["a", "b"])
    out, preview, params = tmp_path / "augmented", tmp_path / "preview.png", tmp_path / "params.yaml"

    def command(augment_params: dict) -> subprocess.CompletedProcess:
        params.write_text(json.dumps({"augment": augment_params}), encoding="utf-8")
        arguments = ["--prepared", prepared, "--out", out, "--preview", preview, "--params", params]
        return subprocess.run(
            [sys.executable, "-c", MAIN_UNDER_JAX, *map(str, arguments)],
            env={**os.environ, "KERAS_BACKEND": "jax"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )

    refused = command({"shift_pixels": 12})
    assert refused.returncode == 1
    assert refused.stderr == "error: augment.shift_pixels must be below the image's 12 pixels, but is 12\n"
    assert not out.exists()
    assert not preview.exists()
    done = command({"eraser": {"p": 1, "s_l": 0.1}, "copies": 3})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "40 images: 100.0% erased" in done.stdout
    assert "3 augmented copies of the training split: 120 images, 51,840 bytes in" in done.stdout
    assert np.load(out / "images.npy").shape == (120, 12, 12, 3)
    assert read_json(out / "summary.json")["eraser"]["erased_fraction"] == 1
