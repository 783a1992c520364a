import hashlib
import shutil
import socket

import numpy as np
import pytest

from tasks import weights
from tasks.errors import NightlyError
from tasks.resnet import build_backbone
from tasks.weights import find_weights, load_weights
from tests.misbehaving_server import MisbehavingServer, Route


def network(name="resnet20", size=8):
    return build_backbone(name, (size, size, 3))


@pytest.fixture(scope="module")
def trained():
    """A resnet20 whose weights no other has, moving averages included."""
    backbone, rng = network(), np.random.default_rng(0)
    backbone.set_weights([rng.uniform(0.5, 1, weight.shape) for weight in backbone.weights])
    return backbone


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one.get_weights(), other.get_weights(), strict=True))


def write_published(path, layers, change=lambda name, values: values):
    """Write weights as Keras 2 wrote those of keras.applications: by layer, names in attributes, ``conv/kernel:0``."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.1.6"
        for layer in layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, value in zip(names, layer.get_weights(), strict=True):
                group.create_dataset(name, data=change(layer.name, value))


@pytest.mark.slow
def test_weights_of_keras_applications_load_from_each_of_its_formats(tmp_path):
    import keras

    published = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(32, 32, 3))
    rng = np.random.default_rng(0)
    published.set_weights([rng.uniform(0.5, 1, weight.shape) for weight in published.weights])
    write_published(tmp_path / "notop.h5", published.layers)
    published.save_weights(tmp_path / "keras3.weights.h5")
    published.save(tmp_path / "whole.keras")
    for path in sorted(tmp_path.iterdir()):
        ours = network("resnet50", 32)
        load_weights(ours, path)
        assert same(ours, published), path
    # The hand-written file is what Keras itself takes for one of its published files.
    again = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(32, 32, 3))
    again.load_weights(tmp_path / "notop.h5")
    assert same(again, published)


def test_a_whole_model_in_keras_2s_format(trained, tmp_path):
    from keras.src.legacy.saving.legacy_h5_format import save_model_to_hdf5

    save_model_to_hdf5(trained, str(tmp_path / "model.h5"), include_optimizer=False)
    ours = network()
    load_weights(ours, tmp_path / "model.h5")
    assert same(ours, trained)


def test_names_count_and_not_the_order_in_the_file(trained, tmp_path):
    write_published(tmp_path / "w.h5", trained.layers[::-1])
    ours = network()
    load_weights(ours, tmp_path / "w.h5")
    assert same(ours, trained)


def test_weights_saved_during_training_load_without_the_optimizers(trained, tmp_path):
    import keras

    copy = network()
    copy.compile(keras.optimizers.Adam(0.0), "mse")
    copy.optimizer.build(copy.trainable_variables)
    copy.set_weights(trained.get_weights())
    copy.save_weights(tmp_path / "copy.weights.h5")
    ours = network()
    load_weights(ours, tmp_path / "copy.weights.h5")
    assert same(ours, trained)


def test_one_of_our_classifiers_gives_its_backbones_weights(tmp_path):
    from tasks.classifier import ModelParams, build_classifier

    unit = {"mean": [0.0] * 3, "std": [255.0] * 3, "channel_order": "RGB"}
    params = ModelParams(backbone="resnet20", doublings=0, head_units=(4,), head_batch_normalization=True)
    classifier = build_classifier(params, 8, 3, unit)
    classifier.save(tmp_path / "model.keras")
    ours = network()
    load_weights(ours, tmp_path / "model.keras")
    assert same(ours, classifier.get_layer("resnet20"))


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
def test_weights_of_another_network_are_listed(suffix, tmp_path):
    other, path = network("resnet32"), tmp_path / f"other{suffix}"
    if suffix == ".keras":
        other.save(path)
    elif suffix == ".weights.h5":
        other.save_weights(path)
    else:
        write_published(path, other.layers)
    ours = network()
    before = ours.get_weights()
    with pytest.raises(NightlyError) as caught:
        load_weights(ours, path)
    text = str(caught.value)
    # Twelve convolutions and their BatchNormalization more, in blocks 4 and 5 of three stages.
    assert text.startswith(f"model.weights: {path} does not fit resnet20 without its top: conv2_block4_1_bn is")
    assert text.count("is left over") == 3
    assert text.endswith("; and 21 more")
    assert all(np.array_equal(a, b) for a, b in zip(before, ours.get_weights(), strict=True))


def test_a_layer_of_another_shape_is_told_with_both(trained, tmp_path):
    def change(name, values):
        return values[..., :5] if name in ("conv1_conv", "conv1_bn") else values

    write_published(tmp_path / "w.h5", trained.layers, change)
    message = r"top: conv1_conv must have 3×3×3×16, but has 3×3×3×5; conv1_bn must have 16 \+ 16 \+ 16 \+ 16, but has 5"
    with pytest.raises(NightlyError, match=message):
        load_weights(network(), tmp_path / "w.h5")


def test_a_bias_too_many_does_not_fit(tmp_path):
    import keras

    other = keras.models.clone_model(network(), clone_function=with_bias)
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(NightlyError, match=r"conv1_conv must have 3×3×3×16, but has 3×3×3×16 \+ 16; .*; and 16 more$"):
        load_weights(network(), tmp_path / "other.weights.h5")


def with_bias(layer):
    config = layer.get_config()
    return type(layer).from_config({**config, "use_bias": True} if "use_bias" in config else config)


def test_a_layer_that_is_missing_and_one_that_is_left_over(trained, tmp_path):
    import keras

    top = keras.layers.Dense(10, name="predictions")
    top.build((None, 64))
    write_published(tmp_path / "w.h5", [layer for layer in trained.layers if layer.name != "conv3_block1_1_bn"] + [top])
    with pytest.raises(NightlyError, match=r"top: conv3_block1_1_bn is missing; predictions is left over$"):
        load_weights(network(), tmp_path / "w.h5")


def test_weights_that_are_no_floats_are_refused(trained, tmp_path):
    write_published(tmp_path / "w.h5", trained.layers, lambda name, values: values.astype("int8"))
    with pytest.raises(NightlyError, match="conv1_conv must have float numbers, but has int8"):
        load_weights(network(), tmp_path / "w.h5")


def test_a_file_of_keras_3_without_names_is_refused(trained, tmp_path):
    import h5py

    trained.save_weights(tmp_path / "old.weights.h5")
    with h5py.File(tmp_path / "old.weights.h5", "a") as file:
        for group in file["layers"].values():
            group["vars"].attrs.clear()
    with pytest.raises(NightlyError, match="an older Keras wrote it, without the layers' names"):
        load_weights(network(), tmp_path / "old.weights.h5")


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras"])
@pytest.mark.parametrize("damage", ["empty", "text", "half", "shuffled"])
def test_a_damaged_file_is_refused(suffix, damage, trained, tmp_path):
    path = tmp_path / f"w{suffix}"
    if suffix == ".keras":
        trained.save(path)
    elif suffix == ".weights.h5":
        trained.save_weights(path)
    else:
        write_published(path, trained.layers)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"<html>404 not found</html>",
            "half": data[: len(data) // 2],
            "shuffled": data[:64] + bytes(reversed(data[64:])),
        }[damage]
    )
    with pytest.raises(NightlyError, match=r"w\..* is no readable \.h5 or \.keras file of weights: .") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


def test_a_keras_file_with_a_wrong_bit_is_refused(trained, tmp_path):
    path = tmp_path / "w.keras"
    trained.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(NightlyError, match=r"is no readable .* file of weights: Bad CRC-32"):
        load_weights(network(), path)


def test_a_file_with_nothing_in_it_is_refused(tmp_path):
    import h5py

    with h5py.File(tmp_path / "w.h5", "w"):
        pass
    with pytest.raises(NightlyError, match=r"is no readable .* file of weights"):
        load_weights(network(), tmp_path / "w.h5")


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(NightlyError, match=r"model\.weights must be 'imagenet', null or the path of a weights file"):
        find_weights("resnet50", str(tmp_path))


def test_the_checksum_is_checked(tmp_path):
    path = tmp_path / "w.h5"
    path.write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    assert find_weights("resnet20", str(path), digest) == path
    with pytest.raises(NightlyError, match=f"model.weights_sha256 is {'0' * 64}, but .*w.h5 has {digest}"):
        find_weights("resnet20", str(path), "0" * 64)


def test_the_imagenet_files_are_those_of_keras_applications():
    from keras.src.applications import resnet

    assert weights.IMAGENET_URL == resnet.BASE_WEIGHTS_PATH + "{file}"
    assert {name: hashes[1] for name, hashes in resnet.WEIGHTS_HASHES.items() if name in weights.IMAGENET_MD5} == (
        weights.IMAGENET_MD5
    )


@pytest.mark.parametrize("name", ["resnet18", "plain34", "resnet110"])
def test_a_network_without_imagenet_weights_names_those_with(name):
    message = f"ImageNet weights exist for resnet50, resnet101, resnet152, but model.backbone is {name}"
    with pytest.raises(NightlyError, match=message):
        find_weights(name, "imagenet")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder that stands for the site of the published weights; Keras's cache is empty."""
    from keras.src.backend import config

    monkeypatch.setattr(config, "_KERAS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "IMAGENET_URL", (tmp_path / "site").as_uri() + "/{file}")
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


def test_imagenet_weights_are_fetched_once(published, monkeypatch):
    file = published / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    file.write_bytes(b"weights")
    monkeypatch.setitem(weights.IMAGENET_MD5, "resnet50", hashlib.md5(b"weights").hexdigest())
    assert find_weights("resnet50", "imagenet").read_bytes() == b"weights"
    shutil.rmtree(published)
    assert find_weights("resnet50", "imagenet").read_bytes() == b"weights"


def test_imagenet_weights_that_cannot_be_had_say_what_to_bring(published):
    message = "cannot be fetched .* bring resnet101_weights_tf_dim_ordering_tf_kernels_notop.h5 to this machine"
    with pytest.raises(NightlyError, match=message):
        find_weights("resnet101", "imagenet")
    (published / "resnet101_weights_tf_dim_ordering_tf_kernels_notop.h5").write_bytes(b"not these")
    with pytest.raises(NightlyError, match=message):
        find_weights("resnet101", "imagenet")


def test_a_site_that_stalls_is_not_waited_for_all_night(published, monkeypatch):
    with MisbehavingServer() as server:
        server.routes["/resnet101_weights_tf_dim_ordering_tf_kernels_notop.h5"] = Route(b"x" * 9999, stall_after=99)
        monkeypatch.setattr(weights, "IMAGENET_URL", server.url("/{file}"))
        monkeypatch.setattr(weights, "STALLED_SECONDS", 0.2)
        with pytest.raises(NightlyError, match=r"cannot be fetched .*timed out"):
            find_weights("resnet101", "imagenet")
    assert socket.getdefaulttimeout() is None
