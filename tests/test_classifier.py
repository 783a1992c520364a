import numpy as np
import pytest

from tasks.classifier import ModelParams, build_classifier
from tasks.errors import NightlyError

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


def test_an_image_too_small_for_the_backbone_is_refused():
    with pytest.raises(NightlyError, match="give 16 px, but resnet50 needs 32 px"):
        build_classifier(ModelParams(doublings=1), 8, 10, UNIT)


def test_weights_that_are_no_file_are_refused(tmp_path):
    with pytest.raises(NightlyError, match=r"model\.weights must be 'imagenet', null or the path"):
        build_classifier(ModelParams(weights=str(tmp_path / "none.h5")), 8, 10, UNIT)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    import keras

    images = keras.Input((4,))
    keras.Model(images, keras.layers.Dense(2)(images)).save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(NightlyError, match="does not fit resnet50"):
        build_classifier(ModelParams(weights=str(tmp_path / "other.weights.h5")), 8, 10, UNIT)


def test_weights_with_another_checksum_are_refused(tmp_path):
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
