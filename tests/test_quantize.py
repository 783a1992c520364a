import numpy as np
import pytest

from tasks.engines import read_openvino, write_openvino
from tasks.quantize import calibration_sample, quantize


def test_the_calibration_sample_is_fixed_by_the_seed():
    images = np.arange(1000, dtype=np.uint8).repeat(3).reshape(1000, 1, 1, 3)
    sample = calibration_sample(images, 1)
    assert len(sample) == 300
    np.testing.assert_array_equal(sample, calibration_sample(images, 1))
    assert (sample != calibration_sample(images, 2)).any()
    assert len(calibration_sample(images[:5], 1)) == 5


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_the_layer_before_a_softmax_stays_in_floating_point(activation, tmp_path):
    import keras

    pixels = keras.Input((8, 8, 3), dtype="uint8")
    x = keras.layers.Conv2D(4, 3, activation="relu")(keras.layers.Rescaling(1 / 255)(pixels))
    x = keras.layers.Dense(5, activation="relu", name="hidden")(keras.layers.Flatten()(x))
    classifier = keras.Model(pixels, keras.layers.Dense(3, activation=activation, name="last")(x))
    write_openvino(classifier, tmp_path / "model.xml")
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
    model = quantize(read_openvino(tmp_path / "model.xml"), images)
    products = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Convolution", "MatMul")]
    weights = [node.input_value(1).get_node().get_type_name() for node in products]  # unpacked from int8, or plain
    assert [kind != "Constant" for kind in weights] == [True, True, activation == "relu"]
