import contextlib
import itertools

import numpy as np
import pytest

from tasks.bundle import load_bundle, load_keras_model
from tasks.classifier import ModelParams, build_classifier
from tasks.engines import (
    ENGINES,
    REFERENCE,
    KerasEngine,
    OpenVINOEngine,
    batched,
    open_engine,
    read_openvino,
    supports_bfloat16,
    with_features,
    write_openvino,
)
from tasks.errors import NightlyError

EXPECTED = [name for name in ENGINES if name != "openvino-bfloat16" or supports_bfloat16()]


@pytest.fixture(scope="module")
def images(prepared):
    return np.load(prepared / "test" / "images.npy")


@pytest.mark.parametrize("name", EXPECTED)
def test_engines_give_probabilities_and_the_features_below_the_head(exported, images, name):
    bundle = load_bundle(exported)
    engine = open_engine(bundle, name)
    probabilities, features = engine.run(images)
    classifier = load_keras_model(bundle)
    pooled = type(classifier)(classifier.input, classifier.get_layer("pool").output)
    tolerance = 1e-5 if "float32" in name else 0.02
    np.testing.assert_allclose(probabilities, classifier.predict(images, verbose=0), atol=tolerance)
    np.testing.assert_allclose(features, pooled.predict(images, verbose=0), atol=tolerance, rtol=tolerance)
    assert probabilities.dtype == features.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(list(engine.stream(batched(images, 8)))), probabilities)


def flattening():
    """Return a classifier that flattens what its one convolution gives."""
    import keras

    pixels = keras.Input((8, 8, 3), dtype="uint8")
    x = keras.layers.Conv2D(4, 3, name="convolution")(keras.layers.Rescaling(1 / 255)(pixels))
    x = keras.layers.Flatten(name="pool")(x)
    return keras.Model(pixels, keras.layers.Dense(3, activation="softmax")(x))


def test_the_features_of_a_flattening_classifier_are_means_over_all_positions(images, tmp_path):
    classifier = flattening()
    maps = type(classifier)(classifier.input, classifier.get_layer("convolution").output)
    expected = maps.predict(images, verbose=0).mean(axis=(1, 2))
    write_openvino(with_features(classifier), tmp_path / "model.xml")
    openvino = OpenVINOEngine(read_openvino(tmp_path / "model.xml"), "openvino-float32")
    for engine in (KerasEngine(with_features(classifier), 8), openvino):
        probabilities, features = engine.run(images)
        np.testing.assert_allclose(features, expected, atol=1e-6)
        np.testing.assert_allclose(probabilities, classifier.predict(images, verbose=0), atol=1e-6)


def test_a_model_with_one_output_has_no_features(images, tmp_path):
    import keras

    pixels = keras.Input((8, 8, 3), dtype="uint8")
    classifier = keras.Model(pixels, keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(pixels)))
    assert with_features(classifier) is classifier
    write_openvino(classifier, tmp_path / "model.xml")
    openvino = OpenVINOEngine(read_openvino(tmp_path / "model.xml"), "openvino-float32")
    for engine in (KerasEngine(classifier, 8), openvino):
        [(rows, features)] = engine.outputs([images[:3]])
        assert features is None
        np.testing.assert_allclose(rows, images[:3].reshape(3, -1) / 255, atol=1e-6)


@pytest.mark.usefixtures("tiny_backbone")
def test_scalars_among_the_outputs_of_a_converted_model_are_left_out(images, tmp_path):
    normalization = {"mean": [0] * 3, "std": [255] * 3, "channel_order": "RGB"}
    classifier = build_classifier(ModelParams(doublings=2, interpolation="bilinear"), 8, 3, normalization)
    for model, count in ((classifier, 1), (with_features(classifier), 2)):
        write_openvino(model, tmp_path / "model.xml")
        converted = read_openvino(tmp_path / "model.xml")
        assert len(converted.outputs) > count
        found = OpenVINOEngine(converted, "openvino-float32").run(images)
        for rows, expected in zip(found, KerasEngine(model, 8).run(images), strict=True):
            assert (rows is None) == (expected is None)
            if rows is not None:
                np.testing.assert_allclose(rows, expected, atol=1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_results_do_not_depend_on_what_else_is_in_the_batch(exported, images, name):
    engine = open_engine(load_bundle(exported), name)
    together = engine.run(images)
    order = np.random.default_rng(0).permutation(len(images))
    for rows, shuffled in zip(together, engine.run(images[order]), strict=True):
        np.testing.assert_array_equal(shuffled, rows[order])
    for count in (1, 3, 8):
        for rows, few in zip(together, engine.run(images[:count]), strict=True):
            np.testing.assert_array_equal(few, rows[:count])


def test_a_stream_keeps_order_over_many_short_batches(exported, images):
    engine = open_engine(load_bundle(exported), "openvino-float32")
    sizes = [4, 1, 3, 2, 4, 4, 1]
    starts = np.cumsum([0, *sizes])
    parts = list(engine.stream(images[a:b] for a, b in itertools.pairwise(starts)))
    assert [len(part) for part in parts] == sizes
    np.testing.assert_array_equal(np.concatenate(parts), engine.probabilities(images[: starts[-1]]))


def test_rows_stay_as_they_are_when_later_batches_are_computed(exported, images):
    engine = open_engine(load_bundle(exported), "openvino-float32")
    kept = [(first, first.copy(), second, second.copy()) for first, second in engine.outputs(batched(images, 4))]
    for first, first_copy, second, second_copy in kept:
        np.testing.assert_array_equal(first, first_copy)
        np.testing.assert_array_equal(second, second_copy)


def test_a_stream_that_is_given_up_leaves_the_engine_usable(exported, images):
    engine = open_engine(load_bundle(exported), "openvino-float32")
    expected = engine.probabilities(images)
    for _ in range(3):
        with contextlib.closing(engine.outputs(batched(images, 4))) as found:
            next(found)
    np.testing.assert_array_equal(engine.probabilities(images), expected)


def test_a_batch_that_is_too_large_is_refused(exported, images):
    engine = open_engine(load_bundle(exported), REFERENCE, batch_size=4)
    with pytest.raises(ValueError, match="may hold 4 images, but holds 5"):
        list(engine.outputs([images[:5]]))


def test_batched_cuts_a_stream_of_images():
    images = [np.full((2, 2, 3), number, np.uint8) for number in range(5)]
    assert [len(batch) for batch in batched(images, 2)] == [2, 2, 1]


def test_an_unknown_engine_is_refused_with_the_nearest_name(exported):
    with pytest.raises(NightlyError, match="did you mean 'openvino-float32'"):
        open_engine(load_bundle(exported), "openvino-float")
