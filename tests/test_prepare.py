import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tasks.archives import write_tar
from tasks.duplicates import mark_duplicates, near_duplicates
from tasks.errors import NightlyError
from tasks.images import encode_png
from tasks.prepare import (
    PrepareParams,
    normalization_of,
    one_hot,
    prepare,
    split_of,
)
from tests.conftest import COLORS, IMAGE_SIZE, colored_image

PARAMS = PrepareParams(decode={"size": IMAGE_SIZE})


def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_source(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "images.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    facts = {"source": "folder", "format": "folder", "file": "images.tar", "bytes": 0, "sha256": ""}
    (folder / "source.json").write_text(json.dumps(facts))
    return folder


def colors(count=40) -> dict[str, bytes]:
    return {f"{name}/{seed}.png": encode_png(colored_image(name, seed)) for name in COLORS for seed in range(count)}


def run(raw: Path, additions: Path, out: Path, params: PrepareParams) -> None:
    prepare(raw, additions, out, out.with_name(f"{out.name}-card.html"), params)


def splits(out: Path) -> dict[str, str]:
    manifest = pd.read_parquet(out / "manifest.parquet")
    return dict(zip(manifest.name, manifest.split, strict=True))


# The split


def test_the_split_is_a_function_of_content_with_the_asked_shares():
    params = PrepareParams(validation_fraction=0.1, test_fraction=0.2)
    found = pd.Series([split_of(hash_of(str(n)), None, False, params) for n in range(20_000)])
    shares = found.value_counts(normalize=True)
    # 20,000 draws: three standard deviations are below 0.01.
    assert shares["test"] == pytest.approx(0.2, abs=0.01)
    assert shares["validation"] == pytest.approx(0.1, abs=0.01)


def test_a_source_with_its_own_test_split_keeps_it():
    for number in range(200):
        assert split_of(hash_of(str(number)), "test", True, PARAMS) == "test"
        assert split_of(hash_of(str(number)), "train", True, PARAMS) != "test"


def test_additions_never_enter_the_test_split_and_keep_the_place_of_the_others():
    for number in range(200):
        before = split_of(hash_of(str(number)), None, False, PARAMS)
        as_addition = split_of(hash_of(str(number)), "addition", False, PARAMS)
        assert as_addition == ("train" if before == "test" else before)


def test_adding_images_moves_none(tmp_path):
    few, many = colors(40), colors(60)
    run(write_source(tmp_path / "few", few), tmp_path, tmp_path / "a", PARAMS)
    run(write_source(tmp_path / "many", many), tmp_path, tmp_path / "b", PARAMS)
    before, after = splits(tmp_path / "a"), splits(tmp_path / "b")
    assert len(after) > len(before)
    assert {name: after[name] for name in before} == before


# The arrays


def test_arrays_follow_the_data_contract(prepared):
    classes = json.loads((prepared / "classes.json").read_text())
    assert classes == ["blue", "green", "red"]
    facts = json.loads((prepared / "prepared.json").read_text())
    manifest = pd.read_parquet(prepared / "manifest.parquet")
    assert len(manifest) == 180
    for split in ("train", "validation", "test"):
        images = np.load(prepared / split / "images.npy", mmap_mode="r")
        targets = np.load(prepared / split / "targets.npy", mmap_mode="r")
        assert images.shape == (facts["counts"][split], IMAGE_SIZE, IMAGE_SIZE, 3)
        assert images.dtype == np.uint8
        assert targets.shape == (len(images), 3)
        assert targets.dtype == np.float32
        assert (targets.sum(axis=1) == 1).all()
        rows = manifest[manifest.split == split].sort_values("position")
        assert list(rows.position) == list(range(len(images)))
        for image, target, name in zip(images, targets, rows.name, strict=True):
            color, seed = name.removesuffix(".png").split("/")
            assert classes[target.argmax()] == color
            np.testing.assert_array_equal(image, colored_image(color, int(seed)))


def test_the_same_source_gives_the_same_bytes(raw, prepared, tmp_path):
    run(raw, tmp_path / "none", tmp_path / "again", PARAMS)
    for file in sorted(path for path in prepared.rglob("*") if path.is_file()):
        twin = tmp_path / "again" / file.relative_to(prepared)
        assert twin.read_bytes() == file.read_bytes(), file.name


def test_examples_are_files_of_the_test_split_as_they_came(prepared):
    examples = sorted((prepared / "examples").rglob("*.png"))
    assert 3 <= len(examples) <= 12
    found = splits(prepared)
    for path in examples:
        name = path.relative_to(prepared / "examples").as_posix()
        assert found[name] == "test"
        color, seed = name.removesuffix(".png").split("/")
        assert path.read_bytes() == encode_png(colored_image(color, int(seed)))


def test_the_test_digest_ignores_training_data(tmp_path):
    few = colors(40)
    run(write_source(tmp_path / "few", few), tmp_path, tmp_path / "a", PARAMS)
    found = splits(tmp_path / "a")
    fewer = {name: data for name, data in few.items() if found[name] != "train" or not name.endswith("7.png")}
    run(write_source(tmp_path / "fewer", fewer), tmp_path, tmp_path / "b", PARAMS)
    a, b = (json.loads((tmp_path / which / "prepared.json").read_text()) for which in "ab")
    assert a["test_digest"] == b["test_digest"]
    assert a["data_digest"] != b["data_digest"]


# Additions


def add(additions: Path, name: str, members: dict[str, bytes]) -> Path:
    additions.mkdir(exist_ok=True)
    write_tar(additions / name, members.items())
    return additions


def some(color: str, count: int, class_name: str | None = None) -> dict[str, bytes]:
    """Images that no source has; by default in the class of their color."""
    return {
        f"{class_name or color}/new{seed}.png": encode_png(colored_image(color, 1000 + seed)) for seed in range(count)
    }


def prepared_with(tmp_path: Path, members: dict[str, bytes], **changes) -> tuple[pd.DataFrame, Path]:
    """Return the manifest and the folder of what the three colors and an archive of additions give."""
    additions = add(tmp_path / "additions", "2026-01-01.tar", members)
    run(write_source(tmp_path / "raw", colors()), additions, tmp_path / "out", PARAMS.changed(**changes))
    return pd.read_parquet(tmp_path / "out" / "manifest.parquet"), tmp_path / "out"


def test_additions_are_taken_in_and_leave_the_test_split_as_it_was(tmp_path):
    manifest, out = prepared_with(tmp_path, some("red", 60))
    added = manifest[manifest.origin == "2026-01-01.tar"]
    assert len(added) == 60
    assert set(added["class"]) == {"red"}
    assert set(added.split) == {"train", "validation"}
    run(tmp_path / "raw", tmp_path / "none", tmp_path / "without", PARAMS)
    digests = [
        json.loads((folder / "prepared.json").read_text())["test_digest"] for folder in (out, tmp_path / "without")
    ]
    assert digests[0] == digests[1]
    before = splits(tmp_path / "without")
    assert {name: splits(out)[name] for name in before} == before


def test_additions_stay_out_of_the_test_split_where_the_source_brings_its_own(tmp_path):
    members = {f"{'test' if n % 4 == 0 else 'train'}/{name}": data for n, (name, data) in enumerate(colors().items())}
    additions = add(tmp_path / "additions", "a.tar", some("red", 60))
    run(write_source(tmp_path / "raw", members), additions, tmp_path / "out", PARAMS)
    manifest = pd.read_parquet(tmp_path / "out" / "manifest.parquet")
    assert set(manifest.split[manifest.origin == "a.tar"]) == {"train", "validation"}


def test_what_is_not_a_finished_archive_is_no_addition(tmp_path):
    additions = tmp_path / "additions"
    additions.mkdir()
    for name in (".intake.partial-17", ".hidden.tar", ".gitkeep", "a.tar.dvc"):
        (additions / name).write_bytes(b"no tar")
    run(write_source(tmp_path / "raw", colors()), additions, tmp_path / "out", PARAMS)
    assert set(pd.read_parquet(tmp_path / "out" / "manifest.parquet").origin) == {"source"}


def test_an_addition_takes_no_image_of_the_source_away(tmp_path):
    wrong = {f"green/{name.split('/')[1]}": data for name, data in colors().items() if name.startswith("red")}
    manifest, out = prepared_with(tmp_path, wrong | {"blue/copy.png": colors()["blue/1.png"]})
    added = manifest[manifest.origin != "source"].set_index("name")
    assert added.status["blue/copy.png"] == "duplicate"
    assert set(added.status.drop("blue/copy.png")) == {"label_conflict"}
    assert (manifest.status[manifest.origin == "source"] == "ok").all()
    assert (out / "test" / "images.npy").is_file()


def test_a_new_class_waits_for_enough_images_and_then_joins_without_test_images(tmp_path):
    manifest, out = prepared_with(tmp_path, some("red", 5, "violet"))
    added = manifest[manifest["class"] == "violet"]
    assert set(added.status) == {"class_too_small"}
    assert "class violet is new and has" in added.reason.iloc[0]
    assert json.loads((out / "classes.json").read_text()) == ["blue", "green", "red"]
    add(tmp_path / "additions", "2026-01-02.tar", some("green", 60, "violet"))
    run(tmp_path / "raw", tmp_path / "additions", out, PARAMS)
    manifest = pd.read_parquet(out / "manifest.parquet")
    added = manifest[manifest["class"] == "violet"]
    assert set(added.status) == {"ok"}
    assert set(added.split) == {"train", "validation"}
    assert json.loads((out / "classes.json").read_text()) == ["blue", "green", "red", "violet"]
    assert np.load(out / "test" / "targets.npy")[:, 3].sum() == 0
    assert np.load(out / "train" / "targets.npy")[:, 3].sum() >= 10


def test_a_new_class_that_is_not_expected_stops_the_stage_once_it_would_join(tmp_path):
    with pytest.raises(NightlyError, match=r"new \['violet'\]"):
        prepared_with(tmp_path, some("red", 60, "violet"), expected_classes=list(COLORS))


# Normalization and one-hot


def test_one_hot():
    np.testing.assert_array_equal(one_hot(np.array([2, 0]), 3), np.array([[0, 0, 1], [1, 0, 0]], np.float32))


def test_standardize_measures_mean_and_deviation_by_channel():
    images = np.random.default_rng(0).integers(0, 256, (700, 4, 5, 3)).astype(np.uint8)
    found = normalization_of("standardize", images)
    np.testing.assert_allclose(found["mean"], images.mean(axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["std"], images.std(axis=(0, 1, 2)), atol=1e-5)


def test_a_constant_channel_is_not_divided_by_zero():
    assert normalization_of("standardize", np.full((3, 2, 2, 3), 9, np.uint8))["std"] == [1.0, 1.0, 1.0]


def test_the_statistics_are_those_of_the_training_split_alone(prepared):
    images = np.load(prepared / "train" / "images.npy")
    found = json.loads((prepared / "normalization.json").read_text())
    np.testing.assert_allclose(found["mean"], images.mean(axis=(0, 1, 2)), atol=1e-4)


# Duplicates


def rows(*entries):
    manifest = pd.DataFrame(entries, columns=["name", "class", "split", "content_hash"])
    return manifest.assign(status="ok", reason="", origin="source")


def test_of_exact_copies_one_stays():
    marked = mark_duplicates(rows(("a", "cat", "train", "x"), ("b", "cat", "train", "x"), ("c", "cat", "train", "y")))
    assert list(marked.status) == ["ok", "duplicate", "ok"]
    assert "a" in marked.reason[1]


def test_a_copy_in_the_test_split_is_the_one_that_stays():
    marked = mark_duplicates(rows(("a", "cat", "train", "x"), ("b", "cat", "test", "x")))
    assert list(marked.status) == ["duplicate", "ok"]


def test_copies_with_different_labels_all_go():
    marked = mark_duplicates(rows(("a", "cat", "train", "x"), ("b", "dog", "train", "x"), ("c", "dog", "train", "x")))
    assert list(marked.status) == ["label_conflict"] * 3
    assert "cat, dog" in marked.reason[0]


def test_the_label_of_the_source_holds_against_those_of_additions():
    manifest = rows(("a", "cat", "test", "x"), ("b", "dog", "train", "x"), ("c", "cat", "train", "x"))
    manifest.loc[1:, "origin"] = "a.tar"
    marked = mark_duplicates(manifest)
    assert list(marked.status) == ["ok", "label_conflict", "duplicate"]
    manifest.loc[0, "origin"] = "b.tar"
    assert list(mark_duplicates(manifest).status) == ["label_conflict"] * 3
    manifest.loc[:1, "origin"] = "source"
    assert list(mark_duplicates(manifest).status) == ["label_conflict"] * 3


def test_copies_never_straddle_splits(tmp_path):
    members = colors()
    for name in list(members)[:20]:
        members[name.replace(".png", "-copy.png")] = members[name]
    run(write_source(tmp_path / "raw", members), tmp_path, tmp_path / "out", PARAMS)
    manifest = pd.read_parquet(tmp_path / "out" / "manifest.parquet")
    assert (manifest.status == "duplicate").sum() == 20
    used = manifest[manifest.status == "ok"]
    assert not used.content_hash.duplicated().any()


def test_near_duplicates_are_found_and_others_are_not():
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    pixels[3] = np.clip(pixels[1].astype(int) + 1, 0, 255)
    assert near_duplicates(pixels, np.arange(4)) == [(1, 3)]


# The gates


def gate(tmp_path, members, **changes):
    with pytest.raises(NightlyError) as caught:
        run(write_source(tmp_path / "raw", members), tmp_path, tmp_path / "out", PARAMS.changed(**changes))
    assert not (tmp_path / "out").exists(), "a failed stage leaves nothing that looks finished"
    return str(caught.value)


def test_unreadable_images_get_a_reason_and_too_many_stop_the_stage(tmp_path):
    members = colors()
    members["red/bad.png"] = b"this is no image"
    message = gate(tmp_path, members, maximum_unreadable_fraction=0.0)
    assert "1 of 121 images are unreadable" in message
    assert "red/bad.png (not_an_image" in message
    run(tmp_path / "raw", tmp_path, tmp_path / "out", PARAMS)
    manifest = pd.read_parquet(tmp_path / "out" / "manifest.parquet").set_index("name")
    assert manifest.status["red/bad.png"] == "not_an_image"
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["left_out"] == {"not_an_image": 1}


def test_a_class_that_is_too_small_is_named(tmp_path):
    members = {name: data for name, data in colors().items() if not name.startswith("green") or name < "green/15"}
    assert "green (" in gate(tmp_path, members)


def test_an_empty_source_is_an_error(tmp_path):
    assert "holds no images" in gate(tmp_path, {})


def test_one_class_is_an_error(tmp_path):
    members = {name: data for name, data in colors().items() if name.startswith("red")}
    assert "at least two classes" in gate(tmp_path, members)


def test_classes_other_than_expected_are_named(tmp_path):
    message = gate(tmp_path, colors(), expected_classes=["red", "green", "violet"])
    assert "missing ['violet']" in message
    assert "new ['blue']" in message


def test_fractions_must_leave_room_for_training():
    with pytest.raises(ValueError, match="must be below 1"):
        PrepareParams(validation_fraction=0.5, test_fraction=0.5)
