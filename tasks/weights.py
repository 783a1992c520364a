"""A backbone's weights from ImageNet or from a file, strictly: the same layers in the same shapes, none left over."""

import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import NightlyError
from tasks.files import sha256_file

#: Where keras.applications fetches ImageNet weights without the top, and their MD5 as it lists it.
IMAGENET_URL = "https://storage.googleapis.com/tensorflow/keras-applications/resnet/{file}"
IMAGENET_FILE = "{network}_weights_tf_dim_ordering_tf_kernels_notop.h5"
IMAGENET_MD5 = {
    "resnet50": "4d473c1dd8becc155b73f8504c6f6626",
    "resnet101": "88cf7a10940856eca736dc7b7e228a21",
    "resnet152": "ee4c566cf9a93f14d82f913c2dc6dd0c",
}
#: A server that sends nothing for so long has stalled.
STALLED_SECONDS = 60.0
#: How many mismatches an error lists.
LISTED = 3


def find_weights(network: str, source: str, sha256: str | None = None) -> Path:
    """Return the local file that ``model.weights: source`` means for ``network``; ImageNet's is fetched once.

    Raises:
        NightlyError: there is no such file, no ImageNet weights for the network, no network, or another checksum.
    """
    if source == "imagenet":
        path = _fetch_imagenet(network)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise NightlyError(
                f"model.weights must be 'imagenet', null or the path of a weights file, but '{path}' is not a file"
            )
    if sha256 and (digest := sha256_file(path)) != sha256:
        raise NightlyError(f"model.weights_sha256 is {sha256}, but {path} has {digest}")
    return path


def load_weights(backbone: Any, path: Path) -> None:
    """Load a weights file into the Keras model ``backbone``, layer by layer of the same name.

    Args:
        path: a ``.h5`` file of Keras 2 (as those of ``keras.applications``) or 3, or a ``.keras`` file of the
            backbone or of one of our classifiers, whose backbone's weights are taken.

    Raises:
        NightlyError: the file cannot be read, or does not fit; with the first mismatches.
    """
    try:
        with _open_weights(path) as found:
            mismatches = _compare(backbone, found)
            if not mismatches:
                for layer in _weighted_layers(backbone):
                    layer.set_weights([np.asarray(weight) for weight in found[layer.name]])
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NightlyError(f"model.weights: {path} is no readable .h5 or .keras file of weights: {reason}") from None
    if mismatches:
        listed = "; ".join(mismatches[:LISTED])
        more = f"; and {len(mismatches) - LISTED} more" if len(mismatches) > LISTED else ""
        raise NightlyError(f"model.weights: {path} does not fit {backbone.name} without its top: {listed}{more}")


def _compare(backbone: Any, found: dict[str, list[Any]]) -> list[str]:
    """Return a phrase for every layer that differs between ``backbone`` and what a file holds."""
    mismatches = []
    for layer in _weighted_layers(backbone):
        wanted = [tuple(weight.shape) for weight in layer.weights]
        if layer.name not in found:
            mismatches.append(f"{layer.name} is missing")
        elif (shapes := [tuple(weight.shape) for weight in found[layer.name]]) != wanted:
            mismatches.append(f"{layer.name} must have {_written(wanted)}, but has {_written(shapes)}")
        elif kinds := [weight.dtype for weight in found[layer.name] if weight.dtype.kind != "f"]:
            mismatches.append(f"{layer.name} must have float numbers, but has {kinds[0]}")
    known = {layer.name for layer in _weighted_layers(backbone)}
    return mismatches + [f"{name} is left over" for name in sorted(found.keys() - known)]


def _written(shapes: list[tuple[int, ...]]) -> str:
    return " + ".join("×".join(map(str, shape)) or "scalar" for shape in shapes)


def _weighted_layers(model: Any) -> list[Any]:
    return [layer for layer in model.layers if layer.weights]


@contextmanager
def _open_weights(path: Path) -> Iterator[dict[str, list[Any]]]:
    """Yield a file's weights by layer name: arrays, or HDF5 data sets, which are read when their shape is known."""
    if path.suffix == ".keras":
        yield _read_keras(path)
        return
    import h5py

    with h5py.File(path, "r") as file:
        if "layer_names" in file.attrs:
            yield _read_keras_2(file)
        elif "model_weights" in file:
            yield _read_keras_2(file["model_weights"])
        else:
            yield _read_keras_3(file)


def _read_keras(path: Path) -> dict[str, list[Any]]:
    import keras

    import tasks.layers  # noqa: F401  registers the layers that the file names

    model = keras.saving.load_model(path, compile=False, safe_mode=True)
    inner = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    backbone = inner[0] if len(inner) == 1 else model
    return {layer.name: layer.get_weights() for layer in _weighted_layers(backbone)}


def _read_keras_2(group: Any) -> dict[str, list[Any]]:
    """Read Keras 2's format: attributes list the layers and each one's weights, in their order."""

    def names(of: Any, attribute: str) -> list[str]:
        return [name.decode() if isinstance(name, bytes) else str(name) for name in of.attrs[attribute]]

    found = {}
    for layer in names(group, "layer_names"):
        if weights := names(group[layer], "weight_names"):
            found[layer] = [group[layer][weight] for weight in weights]
    return found


def _read_keras_3(file: Any) -> dict[str, list[Any]]:
    """Read Keras 3's format: groups ``layers/conv2d_7/vars`` hold weights 0, 1, ... and the layer's name."""
    found = {}
    for group in file["layers"].values():
        variables = group["vars"]
        if len(variables):
            if "name" not in variables.attrs:
                raise ValueError("an older Keras wrote it, without the layers' names; save it as .keras there")
            found[variables.attrs["name"]] = [variables[str(number)] for number in range(len(variables))]
    return found


def _fetch_imagenet(network: str) -> Path:
    """Download ImageNet weights into Keras's own cache, or find them there."""
    import keras

    if network not in IMAGENET_MD5:
        raise NightlyError(
            f"model.weights: ImageNet weights exist for {', '.join(IMAGENET_MD5)}, but model.backbone is {network}: "
            "set model.weights to null for random weights or to the path of a file"
        )
    name = IMAGENET_FILE.format(network=network)
    url = IMAGENET_URL.format(file=name)
    limit = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)  # get_file has no time limit of its own
    try:
        return Path(keras.utils.get_file(name, url, cache_subdir="models", file_hash=IMAGENET_MD5[network]))
    except Exception as error:  # get_file raises a bare Exception for any network trouble
        raise NightlyError(
            f"model.weights: the ImageNet weights cannot be fetched ({' '.join(str(error).split())[:200]}); bring "
            f"{name} to this machine and set model.weights to its path, or set it to null for random weights"
        ) from None
    finally:
        socket.setdefaulttimeout(limit)
