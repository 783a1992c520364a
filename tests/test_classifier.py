from pathlib import Path

import numpy as np
import pytest

from tasks.classifier import ModelParams, build_classifier, split_at_pool
from tasks.errors import NightlyError
from tasks.params import parse_section

UNIT = {"mode": "unit", "mean": [0.0] * 3, "std": [255.0] * 3, "channel_order": "RGB"}


@pytest.fixture(scope="module")
def resnet():
    return build_classifier(ModelParams(doublings=2, batch_normalization_momentum=0.9), 8, 10, UNIT)


def test_the_network_takes_raw_pixels_and_gives_probabilities(resnet):
    assert resnet.input_shape == (None, 8, 8, 3)
    assert resnet.inputs[0].dtype == "uint8"
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    probabilities = np.asarray(resnet(images, training=False))
    assert probabilities.shape == (2, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_the_backbone_is_resnet50_as_published(resnet):
    backbone = resnet.get_layer("resnet50")
    trainable = sum(int(np.prod(weight.shape)) for weight in backbone.trainable_weights)
    assert backbone.count_params() == 23_587_712
    assert trainable == 23_534_592
    assert backbone.input_shape == (None, 32, 32, 3)


def test_the_momentum_reaches_every_batch_normalization_of_the_backbone(resnet):
    import keras

    layers = [layer for layer in resnet.get_layer("resnet50").layers if hasattr(layer, "moving_mean")]
    assert len(layers) == 53
    assert all(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    assert {layer.momentum for layer in layers} == {0.9}


def test_the_notebooks_head_layer_by_layer(tiny_backbone):
    params = ModelParams(doublings=3, pool="flatten", head_units=(128, 64), head_batch_normalization=True, dropout=0.5)
    model = build_classifier(params, 32, 10, UNIT)
    names = [type(layer).__name__ for layer in model.layers]
    head = names[names.index("Flatten") :]
    block = ["BatchNormalization", "Dense", "Dropout"]
    assert head == ["Flatten", *block, *block, "BatchNormalization", "Dense"]
    assert [layer.units for layer in model.layers if hasattr(layer, "units")] == [128, 64, 10]
    assert {layer.rate for layer in model.layers if type(layer).__name__ == "Dropout"} == {0.5}
    assert names.count("UpSampling2D") == 3


def test_upsampling_doubles_inside_the_model(tiny_backbone):
    model = build_classifier(ModelParams(doublings=3), 32, 10, UNIT)
    assert model.get_layer("tiny").input_shape == (None, 256, 256, 3)


def test_the_last_layer_computes_in_float32_under_mixed_precision(tiny_backbone):
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_classifier(ModelParams(), 8, 3, UNIT)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("tiny").layers[1].compute_dtype == "bfloat16"
    assert model.layers[-1].compute_dtype == "float32"
    assert model.outputs[0].dtype == "float32"


@pytest.mark.parametrize(
    ("backbone", "size", "message"),
    [
        ("resnet50", 8, "model.doublings 1 of 8 px give 16 px, but resnet50 needs 32 px or more"),
        ("plain18", 8, "give 16 px, but plain18 needs 32 px or more"),
        ("resnet20", 1, "give 2 px, but resnet20 needs 4 px or more"),
    ],
)
def test_an_image_too_small_for_the_backbone_is_refused(backbone, size, message):
    with pytest.raises(NightlyError, match=message):
        build_classifier(ModelParams(backbone=backbone, doublings=1), size, 10, UNIT)


def test_an_unknown_backbone_is_refused_with_all_that_there_are():
    with pytest.raises(
        NightlyError, match=r"'model.backbone': input should be 'resnet18', .*'plain56', but is 'vgg16'"
    ):
        parse_section({"backbone": "vgg16"}, "model", ModelParams, Path("params.yaml"))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    import keras

    images = keras.Input((4,))
    keras.Model(images, keras.layers.Dense(2)(images)).save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(NightlyError, match="does not fit resnet20"):
        build_classifier(ModelParams(backbone="resnet20", weights=str(tmp_path / "other.weights.h5")), 8, 10, UNIT)


def test_the_checksum_of_the_weights_is_checked(tmp_path):
    (tmp_path / "w.h5").write_bytes(b"abc")
    params = ModelParams(weights=str(tmp_path / "w.h5"), weights_sha256="0" * 64)
    with pytest.raises(NightlyError, match=r"w\.h5 has ba7816bf"):
        build_classifier(params, 8, 10, UNIT)


def test_weights_from_a_file_arrive_in_the_backbone(tmp_path, resnet):
    backbone = resnet.get_layer("resnet50")
    backbone.save_weights(tmp_path / "backbone.weights.h5")
    copy = build_classifier(ModelParams(weights=str(tmp_path / "backbone.weights.h5")), 8, 4, UNIT)
    for mine, theirs in zip(copy.get_layer("resnet50").get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def values(layers, *names):
    return [np.array(getattr(layer, name)) for layer in layers for name in names if hasattr(layer, name)]


def what_a_fit_changes(**freezing):
    """Train one step; return whether convolutions, BatchNormalization and its averages, and the head changed."""
    import keras

    model = build_classifier(ModelParams(backbone="resnet20", doublings=0), 8, 3, UNIT, **freezing)
    inner = model.get_layer("resnet20").layers

    def parts():
        return {
            "kernels": values(inner, "kernel"),
            "scales": values(inner, "gamma", "beta"),
            "averages": values(inner, "moving_mean", "moving_variance"),
            "head": model.layers[-1].get_weights(),
        }

    before = parts()
    model.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy")
    model.fit(some_images(16), np.eye(3)[np.arange(16) % 3], batch_size=16, verbose=0)
    after = parts()
    return {part: any((a != b).any() for a, b in zip(before[part], after[part], strict=True)) for part in before}


def some_images(count, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_everything_trains_by_default():
    assert what_a_fit_changes() == {"kernels": True, "scales": True, "averages": True, "head": True}


def test_a_frozen_backbone_stays_as_it_is():
    assert what_a_fit_changes(frozen=True) == {"kernels": False, "scales": False, "averages": False, "head": True}


def test_frozen_batch_normalization_stays_while_the_convolutions_train():
    found = what_a_fit_changes(freeze_batch_normalization=True)
    assert found == {"kernels": True, "scales": False, "averages": False, "head": True}


@pytest.mark.parametrize("freezing", ["frozen", "freeze_batch_normalization"])
def test_frozen_batch_normalization_does_not_look_at_the_batch(freezing, tiny_backbone):
    model = build_classifier(ModelParams(), 8, 3, UNIT, **{freezing: True})
    images = some_images(8)
    together = np.asarray(model(images, training=True))
    alone = np.concatenate([np.asarray(model(images[i : i + 1], training=True)) for i in range(8)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_weights_move_between_frozen_and_unfrozen_classifiers():
    params = ModelParams(backbone="plain20", doublings=0, head_units=(4,), head_batch_normalization=True)
    free = build_classifier(params, 8, 3, UNIT)
    frozen = build_classifier(params, 8, 3, UNIT, frozen=True)
    assert [weight.path for weight in frozen.weights] == [weight.path for weight in free.weights]
    frozen.set_weights(free.get_weights())
    np.testing.assert_array_equal(np.asarray(frozen(some_images(4))), np.asarray(free(some_images(4))))


HEADS = [{}, {"pool": "flatten", "head_units": (6, 5), "head_batch_normalization": True, "dropout": 0.5}]


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_the_two_halves_are_the_classifier(head, precision, tiny_backbone):
    import keras

    keras.config.set_dtype_policy(precision)
    try:
        classifier = build_classifier(ModelParams(**head), 8, 3, UNIT)
        extractor, top = split_at_pool(classifier)
    finally:
        keras.config.set_dtype_policy("float32")
    images = some_images(5)
    features = extractor(images)
    assert extractor.inputs[0].dtype == "uint8"
    assert keras.backend.standardize_dtype(features.dtype) == "float32"
    assert tuple(features.shape) == (5, classifier.get_layer("pool").output.shape[1])
    # NumPy in between, as a file of features would have it.
    np.testing.assert_array_equal(np.asarray(top(np.asarray(features))), np.asarray(classifier(images)))
    assert [layer.name for layer in top.layers[1:]] == [
        layer.name for layer in classifier.layers[classifier.layers.index(classifier.get_layer("pool")) + 1 :]
    ]


@pytest.mark.parametrize("head", HEADS)
def test_training_the_head_trains_the_classifier(head, tiny_backbone, tmp_path):
    import keras

    classifier = build_classifier(ModelParams(**head), 8, 3, UNIT)
    extractor, top = split_at_pool(classifier)
    images = some_images(30)
    before, inner = np.asarray(classifier(images)), classifier.get_layer("tiny").get_weights()
    features = np.asarray(extractor(images))
    top.compile(keras.optimizers.Adam(0.05), "categorical_crossentropy")
    top.fit(features, np.eye(3)[np.arange(30) % 3], epochs=2, verbose=0)
    after = np.asarray(classifier(images))
    assert np.abs(after - before).max() > 0.01
    np.testing.assert_array_equal(np.asarray(top(features)), after)
    for mine, old in zip(classifier.get_layer("tiny").get_weights(), inner, strict=True):
        np.testing.assert_array_equal(mine, old)
    classifier.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    np.testing.assert_array_equal(np.asarray(loaded(images)), after)
