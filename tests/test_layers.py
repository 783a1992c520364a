"""The layers against plain NumPy: exact values, and laws where they are random."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare

# All seeds are fixed, so a test passes or fails for good; below this, a law counts as different.
ALPHA = 1e-3


@pytest.fixture(scope="module")
def layers():
    from tasks import layers

    return layers


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def black(count: int, height: int, width: int) -> np.ndarray:
    return np.zeros((count, height, width, 3), np.uint8)


def run(layer, images: np.ndarray) -> np.ndarray:
    out = np.asarray(layer(images, training=True))
    assert out.dtype == np.uint8
    assert out.shape == images.shape
    return out


def rectangles(masks: np.ndarray) -> np.ndarray:
    """Return (height, width, top, left) of every non-empty mask, which must be a full rectangle."""
    found = []
    for mask in masks[masks.any(axis=(1, 2))]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert box.size == mask.sum()
        found.append((len(rows), len(columns), rows[0], columns[0]))
    return np.array(found)


def rejection_sampler(count: int, height: int, width: int, seed: int, **bounds: float) -> np.ndarray:
    """The published loop, one image at a time: (height, width, top, left) of accepted rectangles."""
    b = {"s_l": 0.02, "s_h": 0.4, "r_1": 0.3, "r_2": 1 / 0.3, **bounds}
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        s = rng.uniform(b["s_l"], b["s_h"]) * height * width
        r = rng.uniform(b["r_1"], b["r_2"])
        w, h = int(np.sqrt(s / r)), int(np.sqrt(s * r))
        left, top = rng.integers(0, width), rng.integers(0, height)
        if left + w <= width and top + h <= height:
            found.append((h, w, top, left))
    return np.array(found)


def two_sample_p(a: np.ndarray, b: np.ndarray) -> float:
    """Return the chi-square p-value that two samples of integers share a law; rare values are pooled."""
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, 25)))
    edges = np.append(edges[:-1], edges[-1] + 1)
    table = np.array([np.histogram(a, edges)[0], np.histogram(b, edges)[0]])
    return chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue


AUGMENTATIONS = {
    "flip": lambda layers, **more: layers.RandomFlip(True, True, **more),
    "shift": lambda layers, **more: layers.RandomShift(2, "reflect", **more),
    "erase": lambda layers, **more: layers.RandomErasing(p=1.0, **more),
    "erase-noise": lambda layers, **more: layers.RandomErasing(p=1.0, pixel_level=True, **more),
}
each_augmentation = pytest.mark.parametrize("make", AUGMENTATIONS.values(), ids=AUGMENTATIONS)


@each_augmentation
def test_outside_training_nothing_happens(layers, make):
    images = noise(8, 8, 12)
    layer = make(layers, seed=0)
    np.testing.assert_array_equal(layer(images), images)
    np.testing.assert_array_equal(layer(images, training=False), images)
    assert (run(layer, images) != images).any()


@each_augmentation
def test_the_seed_decides(layers, make):
    images = noise(16, 8, 12)
    first = make(layers, seed=3)
    once, twice = run(first, images), run(first, images)
    again = make(layers, seed=3)
    np.testing.assert_array_equal(once, run(again, images))
    np.testing.assert_array_equal(twice, run(again, images))
    assert (once != twice).any()
    assert (once != run(make(layers, seed=4), images)).any()


@each_augmentation
def test_configuration_survives_a_round_trip(layers, make):
    import keras

    layer = make(layers, seed=5)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer), safe_mode=True)
    assert type(copy) is type(layer)
    assert copy.get_config() == layer.get_config()
    images = noise(8, 8, 12)
    np.testing.assert_array_equal(run(copy, images), run(layer, images))


@each_augmentation
def test_pixels_must_be_uint8(layers, make):
    with pytest.raises(ValueError, match=r"takes uint8 pixels 0\.\.255, but got float32"):
        make(layers)(np.zeros((2, 8, 8, 3), np.float32), training=True)


def test_flip_mirrors_half_of_the_images_each_way(layers):
    image = noise(1, 4, 6)[0]
    ways = {"as is": image, "h": image[:, ::-1], "v": image[::-1], "hv": image[::-1, ::-1]}

    def outcomes(horizontal: bool, vertical: bool) -> Counter:
        out = run(layers.RandomFlip(horizontal, vertical, seed=1), np.stack([image] * 4000))
        return Counter(next(name for name, way in ways.items() if (one == way).all()) for one in out)

    both = outcomes(True, True)
    assert set(both) == set(ways)
    assert chisquare(list(both.values())).pvalue > ALPHA
    for way, seen in (("h", outcomes(True, False)), ("v", outcomes(False, True))):
        assert set(seen) == {"as is", way}
        assert chisquare(list(seen.values())).pvalue > ALPHA
    assert set(outcomes(False, False)) == {"as is"}


@pytest.mark.parametrize("fill", ["reflect", "edge", "constant"])
def test_shift_is_pad_and_crop_uniform_over_all_offsets(layers, fill):
    k, image = 2, noise(1, 5, 7)[0]
    padded = np.pad(image, ((k, k), (k, k), (0, 0)), mode=fill)
    crops = {(y, x): padded[y : y + 5, x : x + 7] for y in range(2 * k + 1) for x in range(2 * k + 1)}
    out = run(layers.RandomShift(k, fill, seed=1), np.stack([image] * 5000))
    seen = Counter(next(at for at, crop in crops.items() if (one == crop).all()) for one in out)
    assert set(seen) == set(crops)
    assert chisquare(list(seen.values())).pvalue > ALPHA


def test_shift_moves_each_image_by_itself_and_keeps_their_order(layers):
    images = np.arange(50, dtype=np.uint8)[:, None, None, None] + np.zeros((50, 6, 6, 3), np.uint8)
    np.testing.assert_array_equal(run(layers.RandomShift(5, "reflect", seed=1), images), images)


def test_shift_of_zero_changes_nothing(layers):
    images = noise(8, 6, 6)
    np.testing.assert_array_equal(run(layers.RandomShift(0), images), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1,), "pixels must be 0 or more, but is -1"), ((1, "wrap"), "fill must be .* but is 'wrap'")],
)
def test_shift_refuses_what_it_cannot_do(layers, arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.RandomShift(*arguments)


def test_shift_must_be_smaller_than_the_image(layers):
    with pytest.raises(ValueError, match="pixels must be below the image's 4, but is 4"):
        layers.RandomShift(4)(noise(1, 4, 9), training=True)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_p_is_the_share_of_images_erased(layers, p):
    count = 20_000
    # At 20 % of 8 x 8 pixels no rectangle is empty.
    out = run(layers.RandomErasing(p=p, s_l=0.2, v_l=255, seed=2), black(count, 8, 8))
    erased = out.any(axis=(1, 2, 3)).sum()
    assert abs(erased - count * p) <= 4 * np.sqrt(count * p * (1 - p))


def test_exactly_a_rectangle_changes_in_all_channels(layers):
    images = noise(300, 16, 12) // 2
    out = run(layers.RandomErasing(p=1.0, v_l=200, v_h=200, seed=3), images)
    changed = out != images
    assert (changed.all(axis=-1) == changed.any(axis=-1)).all()
    assert (out[changed] == 200).all()
    found = rectangles(changed.any(axis=-1))
    assert len(found) > 290
    # Each image has a rectangle of its own.
    assert len({tuple(one) for one in found}) > 200


BOUNDS = {
    "published": {},
    "notebook-small": {"s_h": 0.1},
    "flat": {"s_l": 0.1, "s_h": 0.9, "r_1": 0.2, "r_2": 0.9},
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 40)])
def test_law_is_the_rejection_samplers(layers, height, width, bounds):
    count = 12_000
    layer = layers.RandomErasing(p=1.0, v_l=255, seed=7, **bounds)
    masks = [run(layer, black(2000, height, width)).any(axis=-1) for _ in range(count // 2000)]
    ours = rectangles(np.concatenate(masks))
    theirs = rejection_sampler(count, height, width, seed=70, **bounds)
    assert len(ours) == count

    def features(found: np.ndarray) -> dict[str, np.ndarray]:
        h, w, top, left = found.T
        return {
            "height": h,
            "width": w,
            "area": h * w,
            "aspect": (1000 * h / w).astype(int),
            "top": top,
            "left": left,
            "room below": height - h - top,
            "room to the right": width - w - left,
            "corner": top * width + left,
        }

    mine, other = features(ours), features(theirs)
    p_values = {name: two_sample_p(mine[name], other[name]) for name in mine}
    assert min(p_values.values()) > ALPHA / len(p_values), p_values


def test_positions_are_uniform_given_the_size(layers):
    layer = layers.RandomErasing(p=1.0, s_l=0.25, s_h=0.25, r_1=1.0, r_2=1.0, v_l=255, seed=8)
    found = rectangles(run(layer, black(5000, 8, 8)).any(axis=-1))
    assert {tuple(size) for size in found[:, :2]} == {(4, 4)}
    seen = Counter(map(tuple, found[:, 2:]))
    assert len(seen) == 25
    assert chisquare(list(seen.values())).pvalue > ALPHA


@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (13, 30)])
def test_drawn_sizes_follow_the_table_whether_or_not_all_are_erased(layers, height, width, p):
    count = 200_000
    layer = layers.RandomErasing(p=p, seed=9)
    layer.build((None, height, width, 3))
    top, left, h, w = (np.asarray(side)[:, 0] for side in layer.draw_rectangles(count, height, width))
    seen = np.zeros((height + 1, width + 1))
    np.add.at(seen, (h, np.where(h > 0, w, 0)), 1)
    expected = count * p * layers.rectangle_law(height, width, 0.02, 0.4, 0.3, 1 / 0.3)
    # Height 0: an empty rectangle, or an image that is not erased.
    expected[0] = [count * (1 - p) + expected[0].sum(), *[0] * width]
    assert not seen[expected == 0].any()
    common = expected >= 5
    observed = np.append(seen[common], seen[~common].sum() + 1e-9)
    wanted = np.append(expected[common], expected[~common].sum() + 1e-9)
    assert chisquare(observed, wanted).pvalue > ALPHA
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert top.max() < height
    assert left.max() < width


def brute_force_law(height, width, s_l, s_h, r_1, r_2) -> np.ndarray:
    """Enumerate a fine grid of (s, r), and for each size every corner that the sampler may try."""
    steps_s = 1 if s_l == s_h else 1200 if r_1 < r_2 else 100_000
    steps_r = 1 if r_1 == r_2 else 1200 if s_l < s_h else 100_000
    s = np.linspace(s_l, s_h, 2 * steps_s + 1)[1::2, None] * height * width
    r = np.linspace(r_1, r_2, 2 * steps_r + 1)[None, 1::2]
    h, w = np.sqrt(s * r).astype(int), np.sqrt(s / r).astype(int)
    law = np.zeros((height + 1, width + 1))
    for i, j in np.ndindex(law.shape):
        corners = [(top, left) for top in range(height) for left in range(width)]
        fitting = [corner for corner in corners if corner[0] + i <= height and corner[1] + j <= width]
        law[i, j] = ((h == i) & (w == j)).sum() * len(fitting) / len(corners)
    return law / law.sum()


@pytest.mark.parametrize(
    ("size", "bounds"),
    [
        ((4, 3), (0.02, 0.4, 0.3, 1 / 0.3)),
        ((2, 2), (0.02, 1.0, 0.3, 1 / 0.3)),
        ((5, 5), (0.1, 0.9, 0.2, 0.8)),
        ((3, 6), (0.5, 0.5, 0.3, 3.0)),
        ((6, 4), (0.05, 0.6, 1.5, 1.5)),
        ((6, 6), (0.25, 0.25, 1.0, 1.0)),
    ],
    ids=["tiny", "empty-sides", "flat", "one-area", "one-aspect", "one-size"],
)
def test_table_equals_brute_force(layers, size, bounds):
    law = layers.rectangle_law(*size, *bounds)
    assert law.shape == (size[0] + 1, size[1] + 1)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(law, brute_force_law(*size, *bounds), atol=5e-4)


def test_empty_rectangles_keep_their_share(layers):
    # On 8 x 8 pixels the published bounds give h = 0 or w = 0 now and then: accepted, and nothing is erased.
    law = layers.rectangle_law(8, 8, 0.02, 0.4, 0.3, 1 / 0.3)
    empty = law[0].sum() + law[1:, 0].sum()
    assert 0.03 < empty < 0.1
    out = run(layers.RandomErasing(p=1.0, v_l=255, seed=10), black(20_000, 8, 8))
    untouched = (~out.any(axis=(1, 2, 3))).mean()
    assert abs(untouched - empty) <= 4 * np.sqrt(empty / 20_000)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 0.4, 0.3, 3), "0 < s_l <= s_h <= 1 must hold"),
        ((0.5, 0.4, 0.3, 3), "0 < s_l <= s_h <= 1 must hold"),
        ((0.1, 0.4, 0, 3), "0 < r_1 <= r_2 must hold"),
        ((0.9, 1.0, 4, 5), "no rectangle fits into an image of 8 x 8 pixels"),
        ((0.9, 0.9, 4, 4), "no rectangle fits into an image of 8 x 8 pixels"),
    ],
)
def test_bounds_that_cannot_work_are_refused(layers, bounds, message):
    with pytest.raises(ValueError, match=message):
        layers.rectangle_law(8, 8, *bounds)


@pytest.mark.parametrize("wrong", [{"p": 1.5}, {"p": -0.1}, {"v_l": 9, "v_h": 8}, {"v_h": 256}])
def test_eraser_refuses_wrong_numbers(layers, wrong):
    with pytest.raises(ValueError, match="but"):
        layers.RandomErasing(**wrong)


def test_fill_is_one_gray_per_image_rounded_and_within_its_bounds(layers):
    arguments = {"p": 1.0, "s_l": 0.2, "s_h": 0.3, "seed": 11}
    out = run(layers.RandomErasing(v_l=50, v_h=54, **arguments), black(8000, 8, 8))
    assert all(len(np.unique(image)) == 2 for image in out)
    values, counts = np.unique(out.max(axis=(1, 2, 3)), return_counts=True)
    assert values.tolist() == [50, 51, 52, 53, 54]
    # A uniform float rounded to the nearest integer: half a share for the two ends.
    assert chisquare(counts, 8000 * np.array([1, 2, 2, 2, 1]) / 8).pvalue > ALPHA


def test_pixel_level_fills_with_independent_noise(layers):
    arguments = {"p": 1.0, "s_l": 0.2, "s_h": 0.3, "pixel_level": True, "seed": 12}
    out = run(layers.RandomErasing(v_l=100, v_h=108, **arguments), black(400, 16, 16))
    pixels = out[out.any(axis=-1)]
    values, counts = np.unique(pixels, return_counts=True)
    assert values.tolist() == list(range(100, 109))
    assert chisquare(counts, counts.sum() * np.array([1, *[2] * 7, 1]) / 16).pvalue > ALPHA
    assert abs(np.corrcoef(pixels.T.astype(float))[np.triu_indices(3, 1)]).max() < 0.05
    neighbors = out[:, :, :-1, 0].astype(float), out[:, :, 1:, 0].astype(float)
    inside = (neighbors[0] > 0) & (neighbors[1] > 0)
    assert abs(np.corrcoef(neighbors[0][inside], neighbors[1][inside])[0, 1]) < 0.05


def test_eraser_keeps_to_the_image_size_it_was_built_for(layers):
    layer = layers.RandomErasing(seed=0)
    run(layer, noise(2, 8, 8))
    with pytest.raises(ValueError, match="incompatible"):
        layer(noise(2, 16, 16), training=True)


def test_normalize_gives_what_imagenets_resnet50_wants(layers):
    import keras

    images = noise(4, 6, 5)
    layer = layers.Normalize([123.68, 116.779, 103.939], [1, 1, 1], reverse_channels=True)
    expected = keras.applications.resnet50.preprocess_input(images.astype("float32"))
    np.testing.assert_allclose(np.asarray(layer(images)), expected, atol=1e-5)


def test_normalize_takes_mean_and_std_in_rgb_order(layers):
    images = np.array([[[[10, 20, 30]]]], np.uint8)
    straight = layers.Normalize([1, 2, 3], [3, 2, 1])
    np.testing.assert_allclose(np.asarray(straight(images))[0, 0, 0], [3, 9, 27])
    reverse = layers.Normalize([1, 2, 3], [3, 2, 1], reverse_channels=True)
    np.testing.assert_allclose(np.asarray(reverse(images))[0, 0, 0], [27, 9, 3])
    unit = layers.Normalize([0, 0, 0], [255, 255, 255])
    np.testing.assert_allclose(np.asarray(unit(images))[0, 0, 0], np.array([10, 20, 30]) / 255, rtol=1e-6)


def test_normalize_rounds_once_under_mixed_precision(layers):
    import ml_dtypes

    images = noise(2, 4, 4)
    mean, std = [123.68, 116.779, 103.939], [58.4, 57.1, 57.4]
    out = np.asarray(layers.Normalize(mean, std, dtype="mixed_bfloat16")(images))
    exact = (images - np.float32(mean)) / np.float32(std)
    assert out.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(out, exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [([0, 0], [1, 1, 1], "three numbers"), ([0, 0, 0], [1, 0, 1], "std must be above 0")],
)
def test_normalize_refuses_wrong_numbers(layers, mean, std, message):
    with pytest.raises(ValueError, match=message):
        layers.Normalize(mean, std)


def test_normalize_refuses_pixels_that_were_scaled_before(layers):
    with pytest.raises(ValueError, match=r"takes uint8 pixels 0\.\.255, but got float32"):
        layers.Normalize([0, 0, 0], [1, 1, 1])(np.zeros((1, 4, 4, 3), np.float32))


# Run in this process under the default backend, and in a fresh one under the other.
COMPILED = """
import keras
import numpy as np
from tasks.layers import Normalize, RandomErasing, RandomFlip, RandomShift, rectangle_law

images = np.random.default_rng(0).integers(0, 256, (40, 10, 14, 3), dtype=np.uint8)
inputs = keras.Input((10, 14, 3), dtype="uint8")
x = RandomFlip(True, True, seed=1)(inputs)
x = RandomShift(2, "constant", seed=2)(x)
x = RandomErasing(p=0.5, seed=3)(x)
assert x.dtype == "uint8", x.dtype
x = Normalize([120, 110, 100], [60, 61, 62], reverse_channels=True)(x)
outputs = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(x))
model = keras.Model(inputs, outputs)
model.compile(optimizer="sgd", loss="categorical_crossentropy", jit_compile=True)
targets = np.eye(2, dtype=np.float32)[np.arange(40) % 2]
states = [np.asarray(layer.seed_generator.state) for layer in model.layers[1:4]]
# 40 images in batches of 16: the last batch has another size.
model.fit(images, targets, batch_size=16, epochs=2, verbose=0)
for layer, before in zip(model.layers[1:4], states):
    assert (np.asarray(layer.seed_generator.state) != before).any(), layer.name

probabilities = model.predict(images, verbose=0)
model.save(folder + "/model.keras")
loaded = keras.saving.load_model(folder + "/model.keras", safe_mode=True)
np.testing.assert_allclose(loaded.predict(images, verbose=0), probabilities, atol=1e-6)

eraser = keras.Sequential([keras.Input((9, 9, 3), dtype="uint8"), RandomErasing(p=1.0, s_l=0.2, v_l=255, seed=4)])
out = np.asarray(eraser(np.zeros((20000, 9, 9, 3), np.uint8), training=True))[..., 0]
assert out.dtype == np.uint8
h, w = (out.any(axis=2).sum(axis=1), out.any(axis=1).sum(axis=1))
law = rectangle_law(9, 9, 0.2, 0.4, 0.3, 1 / 0.3)
seen = np.zeros_like(law)
np.add.at(seen, (h, w), 1 / 20000)
assert np.abs(seen - law).max() < 4 * np.sqrt(law.max() / 20000), np.abs(seen - law).max()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_compiled_training_saving_and_loading(tmp_path):
    exec(compile(COMPILED, "compiled", "exec"), {"folder": str(tmp_path)})


@pytest.mark.slow
def test_the_same_under_jax_without_tensorflow(tmp_path):
    script = f"import sys; sys.modules['tensorflow'] = None; folder = {str(tmp_path)!r}\n{COMPILED}"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
