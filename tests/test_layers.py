"""The layers against plain NumPy, and compiled on both backends; the eraser's law has a file of its own."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from tests.chance import ALPHA, noise, run

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
