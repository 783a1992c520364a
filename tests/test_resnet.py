import math
import re

import numpy as np
import pytest

from tasks.resnet import NETWORKS, build_backbone, minimum_size, multiply_adds


def marked(names):
    """The networks as test parameters; those that take seconds to build are slow tests."""
    big = ("resnet101", "resnet152", "resnet110")
    return [pytest.param(name, marks=pytest.mark.slow) if name in big else name for name in names]


def depth_of(name):
    return int(name.removeprefix("resnet").removeprefix("plain"))


IMAGENET = marked(name for name, network in NETWORKS.items() if not network.cifar)
CIFAR = marked(name for name, network in NETWORKS.items() if network.cifar)
#: The table's last row.
FLOPS = {"resnet18": 1.8e9, "resnet34": 3.6e9, "resnet50": 3.8e9, "resnet101": 7.6e9, "resnet152": 11.3e9}
#: Millions of parameters, He et al. 2015, table 6.
TABLE_6 = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}
#: Without top, beyond the paper: what other libraries' networks of that name have.
TRAINABLE = {"resnet18": 11_176_512, "resnet34": 21_284_672, "resnet50": 23_534_592}


@pytest.fixture(scope="module")
def build():
    """A function that returns network ``name`` at its paper's image size, built once."""
    built = {}

    def build(name):
        if name not in built:
            size = 32 if NETWORKS[name].cifar else 224
            built[name] = build_backbone(name, (size, size, 3))
        return built[name]

    return build


def with_top(backbone, classes):
    import keras

    x = keras.layers.GlobalAveragePooling2D()(backbone.output)
    return keras.Model(backbone.input, keras.layers.Dense(classes)(x))


def trainable(model):
    return sum(math.prod(weight.shape) for weight in model.trainable_weights)


def layers_of(model, kind):
    return [layer for layer in model.layers if type(layer).__name__ == kind]


def with_random_weights(model):
    """Give biases and BatchNormalization values that matter, which else begin as zeros and ones."""
    rng = np.random.default_rng(0)
    weights = model.get_weights()
    model.set_weights([value + rng.uniform(0, 0.1, value.shape) if value.ndim == 1 else value for value in weights])
    return model


def test_the_family_is_complete():
    assert sorted(NETWORKS) == sorted(
        [f"resnet{depth}" for depth in (18, 34, 50, 101, 152, 20, 32, 44, 56, 110)]
        + [f"plain{depth}" for depth in (18, 34, 20, 32, 44, 56)]
    )


@pytest.mark.parametrize("name", IMAGENET)
def test_every_stage_has_the_tables_size(build, name):
    backbone = build(name)
    sizes = [backbone.get_layer("conv1_conv").output.shape[1:3]]
    sizes += [backbone.get_layer(f"conv{stage}_block1_out").output.shape[1:3] for stage in (2, 3, 4, 5)]
    assert sizes == [(112, 112), (56, 56), (28, 28), (14, 14), (7, 7)]
    last = backbone.output_shape
    assert last == (None, 7, 7, 2048 if name in ("resnet50", "resnet101", "resnet152") else 512)


@pytest.mark.parametrize("name", IMAGENET)
def test_every_stage_has_the_tables_blocks(build, name):
    blocks = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
    names = [layer.name for layer in build(name).layers]
    found = [sum(bool(re.fullmatch(rf"conv{stage}_block\d+_out", layer)) for layer in names) for stage in (2, 3, 4, 5)]
    assert found == blocks[depth_of(name)]


@pytest.mark.parametrize("name", marked(NETWORKS))
def test_the_name_counts_the_weighted_layers(build, name):
    projections = [layer for layer in build(name).layers if layer.name.endswith("_0_conv")]
    convolutions = layers_of(build(name), "Conv2D")
    assert len(convolutions) - len(projections) + 1 == depth_of(name)


@pytest.mark.parametrize("name", marked(FLOPS))
def test_the_multiply_adds_are_the_tables(build, name):
    assert multiply_adds(with_top(build(name), 1000)) == pytest.approx(FLOPS[name], rel=0.03)


@pytest.mark.parametrize("depth", [18, 34])
def test_a_plain_network_costs_the_same_but_for_the_projections(build, depth):
    residual, plain = build(f"resnet{depth}"), build(f"plain{depth}")
    # Three projections of twice the filters: 64 to 128 at 28 px, and so on; each costs the same.
    assert multiply_adds(residual) - multiply_adds(plain) == 3 * 28 * 28 * 64 * 128
    assert layers_of(residual, "Add")
    assert not layers_of(plain, "Add")


def test_multiply_adds_by_hand():
    import keras

    images = keras.Input((8, 8, 3))
    inner = keras.Model(images, keras.layers.Conv2D(5, 3, strides=2)(images))  # 3 × 3 places of 3 · 3 · 3 · 5
    outer = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(inner(outer))
    assert multiply_adds(keras.Model(outer, keras.layers.Dense(7)(x))) == 9 * 135 + 45 * 7


def test_multiply_adds_need_an_image_size():
    with pytest.raises(ValueError, match="resnet20 must have one image size, but conv1_conv gives"):
        multiply_adds(build_backbone("resnet20"))


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_parameters_are_the_published_ones(build, name):
    assert trainable(build(name)) == TRAINABLE[name]


def test_resnet50_has_the_published_moving_averages(build):
    assert build("resnet50").count_params() == 23_587_712


@pytest.mark.parametrize("name", marked(TABLE_6))
def test_the_networks_for_cifar_have_table_6s_parameters(build, name):
    millions = trainable(with_top(build(name), 10)) / 1e6
    assert millions == pytest.approx(TABLE_6[name], abs=0.005 if TABLE_6[name] < 1 else 0.05)


@pytest.mark.parametrize("name", CIFAR)
def test_the_networks_for_cifar_have_three_stages(build, name):
    backbone = build(name)
    shapes = [backbone.get_layer(f"conv{stage}_block1_out").output.shape[1:] for stage in (2, 3, 4)]
    assert shapes == [(32, 32, 16), (16, 16, 32), (8, 8, 64)]
    assert not layers_of(backbone, "Conv2D")[0].use_bias


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_a_plain_network_for_cifar_has_the_same_parameters(build, depth):
    residual, plain = build(f"resnet{depth}"), build(f"plain{depth}")
    assert plain.count_params() == residual.count_params()
    assert multiply_adds(plain) == multiply_adds(residual)
    assert not layers_of(plain, "Add")


def test_a_shortcut_without_weights_takes_every_second_pixel_and_pads_with_zeros(build):
    import keras

    backbone = build("resnet20")
    ends = [backbone.get_layer(name).output for name in ("conv2_block3_out", "conv3_block1_0_pad")]
    before, after = keras.Model(backbone.input, ends)(np.random.default_rng(0).normal(size=(2, 32, 32, 3)))
    np.testing.assert_array_equal(np.asarray(after)[..., :16], np.asarray(before)[:, ::2, ::2])
    assert np.asarray(after).shape == (2, 16, 16, 32)
    assert not np.asarray(after)[..., 16:].any()


def test_a_strided_convolution_looks_at_the_pixels_that_its_shortcut_takes(build):
    """One pixel at an even place reaches the middle of a kernel, not its edge."""
    import keras

    backbone = build("resnet18")
    pad, convolution = (backbone.get_layer(f"conv3_block1_1_{part}") for part in ("pad", "conv"))
    images = keras.Input((8, 8, 64))
    model = keras.Model(images, convolution(pad(images)))
    pixel = np.zeros((1, 8, 8, 64), "float32")
    pixel[0, 4, 2, 0] = 1
    found = np.asarray(model(pixel))
    np.testing.assert_allclose(found[0, 2, 1], np.asarray(convolution.kernel)[1, 1, 0], rtol=1e-6)
    assert np.count_nonzero(found.any(axis=-1)) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "plain20"])
def test_the_convolutions_begin_as_he_et_al_say(build, name):
    for layer in layers_of(build(name), "Conv2D"):
        kernel = np.asarray(layer.kernel)
        if kernel.size > 20_000:
            assert kernel.std() == pytest.approx(math.sqrt(2 / math.prod(kernel.shape[:3])), rel=0.03)


@pytest.mark.parametrize("name", ["resnet34", "resnet56"])
def test_the_momentum_reaches_every_batch_normalization(name):
    found = layers_of(build_backbone(name, batch_normalization_momentum=0.8), "BatchNormalization")
    assert len(found) == {"resnet34": 36, "resnet56": 55}[name]
    assert {layer.momentum for layer in found} == {0.8}


@pytest.mark.parametrize("name", ["resnet18", "plain18", "resnet50", "resnet20", "plain20"])
def test_the_smallest_image_leaves_one_pixel(name):
    size = minimum_size(name)
    assert build_backbone(name, (size, size, 3)).output_shape[1:3] == (1, 1)
    assert build_backbone(name, (size + 1, size + 1, 3)).output_shape[1:3] == (2, 2)


def equals_keras_applications(name, function):
    import keras

    published = with_random_weights(function(include_top=False, weights=None, input_shape=(64, 64, 3)))
    ours = build_backbone(name, (64, 64, 3))
    assert [layer.name for layer in ours.layers[1:]] == [layer.name for layer in published.layers[1:]]
    for mine, theirs in zip(ours.layers, published.layers, strict=True):
        assert [tuple(weight.shape) for weight in mine.weights] == [tuple(weight.shape) for weight in theirs.weights]
        if isinstance(mine, keras.layers.BatchNormalization):
            assert mine.epsilon == theirs.epsilon
    ours.set_weights(published.get_weights())
    images = np.random.default_rng(1).normal(0, 50, (2, 64, 64, 3)).astype("float32")
    expected = np.asarray(published(images, training=False))
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    np.testing.assert_array_equal(np.asarray(ours(images, training=False)), expected)


def test_resnet50_is_that_of_keras_applications():
    import keras

    equals_keras_applications("resnet50", keras.applications.ResNet50)


@pytest.mark.slow
def test_resnet101_is_that_of_keras_applications():
    import keras

    equals_keras_applications("resnet101", keras.applications.ResNet101)


@pytest.mark.slow
def test_resnet152_is_that_of_keras_applications():
    import keras

    equals_keras_applications("resnet152", keras.applications.ResNet152)


def gives_the_same_when_loaded(name, path):
    import keras

    size = minimum_size(name)
    backbone = with_random_weights(build_backbone(name, (2 * size, 2 * size, 3)))
    backbone.save(path / "backbone.keras")
    loaded = keras.saving.load_model(path / "backbone.keras", compile=False, safe_mode=True)
    images = np.random.default_rng(1).normal(size=(2, 2 * size, 2 * size, 3)).astype("float32")
    np.testing.assert_array_equal(np.asarray(loaded(images)), np.asarray(backbone(images)))


@pytest.mark.parametrize("name", ["resnet18", "plain18", "resnet20", "plain20"])
def test_a_saved_network_gives_the_same(name, tmp_path):
    gives_the_same_when_loaded(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if depth_of(name) not in (18, 20)])
def test_every_saved_network_gives_the_same(name, tmp_path):
    gives_the_same_when_loaded(name, tmp_path)


@pytest.mark.parametrize("name", ["resnet20", "plain20"])
def test_every_layer_learns(name):
    import keras

    model = with_top(build_backbone(name, (8, 8, 3)), 3)
    before = [np.array(weight) for weight in model.trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), keras.losses.CategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    model.fit(rng.normal(size=(16, 8, 8, 3)), np.eye(3)[rng.integers(0, 3, 16)], batch_size=16, verbose=0)
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert (np.asarray(weight) != old).any(), weight.path


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_a_network_computes_in_bfloat16_when_asked_to(name):
    import keras

    size = minimum_size(name)
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype("float32")
    exact = build_backbone(name, (size, size, 3))
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = build_backbone(name, (size, size, 3))
    finally:
        keras.config.set_dtype_policy("float32")
    half.set_weights(exact.get_weights())
    found = half(images)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    expected = np.asarray(exact(images))
    np.testing.assert_allclose(np.asarray(found).astype("float32"), expected, atol=0.05 * expected.max())
