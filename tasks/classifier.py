"""The network: uint8 pixels, normalization, upsampling, a ResNet50 backbone, a head, class probabilities."""

import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from tasks.errors import NightlyError
from tasks.files import sha256_file
from tasks.params import Section

#: The smallest input that keras.applications' ResNet50 takes, in pixels.
MINIMUM_BACKBONE_SIZE = 32
#: Where keras.applications fetches ResNet50's ImageNet weights without the top, and their MD5 as it lists it.
IMAGENET_WEIGHTS = (
    "https://storage.googleapis.com/tensorflow/keras-applications/resnet/"
    "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
IMAGENET_MD5 = "4d473c1dd8becc155b73f8504c6f6626"


class ModelParams(Section):
    """The network's shape.

    ``doublings`` upsample the image by 2 each, inside the model: three turn CIFAR-10's 32 px into 256 px.
    ``weights`` is ``imagenet``, null for random ones, or the path of a ``.h5``, ``.weights.h5`` or ``.keras``
    file that fits the backbone without its top. ``head_units`` are the widths of the dense ReLU layers between
    the pooled features and the softmax, each followed by ``dropout``.
    ``batch_normalization_momentum`` is that of the backbone: Keras's 0.99 needs several hundred steps before
    the moving averages mean anything, so short runs want 0.9.
    """

    backbone: Literal["resnet50"] = "resnet50"
    weights: str | None = None
    weights_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    doublings: int = Field(2, ge=0, le=6)
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    pool: Literal["flatten", "avg"] = "avg"
    head_units: tuple[int, ...] = ()
    head_batch_normalization: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_normalization_momentum: float = Field(0.99, gt=0, lt=1)

    @field_validator("head_units")
    @classmethod
    def _positive(cls, units: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in units):
            raise ValueError("widths must be 1 or more")
        return units


def build_classifier(params: ModelParams, image_size: int, classes: int, normalization: dict[str, Any]) -> Any:
    """Return a Keras model from uint8 (N, image_size, image_size, 3) RGB to float32 (N, classes) probabilities.

    Args:
        normalization: ``mean``, ``std`` and ``channel_order`` as in ``normalization.json``.

    The last layer computes in float32 under any precision: a softmax in half precision loses the small
    probabilities that the loss is made of.

    Raises:
        NightlyError: the upsampled image is too small for the backbone, or the weights do not fit.
    """
    import keras
    from keras import layers

    from tasks.layers import Normalize

    upsampled = image_size * 2**params.doublings
    if upsampled < MINIMUM_BACKBONE_SIZE:
        raise NightlyError(
            f"model.doublings {params.doublings} of {image_size} px give {upsampled} px, but {params.backbone} needs "
            f"{MINIMUM_BACKBONE_SIZE} px or more: raise model.doublings or prepare.decode.size"
        )
    images = keras.Input((image_size, image_size, 3), dtype="uint8", name="images")
    x = Normalize(
        mean=normalization["mean"],
        std=normalization["std"],
        reverse_channels=normalization["channel_order"] == "BGR",
        name="normalize",
    )(images)
    for number in range(params.doublings):
        x = layers.UpSampling2D(2, interpolation=params.interpolation, name=f"double_{number + 1}")(x)
    x = _backbone(params, upsampled)(x)
    pool = layers.Flatten if params.pool == "flatten" else layers.GlobalAveragePooling2D
    x = pool(name="pool")(x)
    for number, width in enumerate(params.head_units, start=1):
        if params.head_batch_normalization:
            x = layers.BatchNormalization(name=f"head_norm_{number}")(x)
        x = layers.Dense(width, activation="relu", name=f"head_{number}")(x)
        x = layers.Dropout(params.dropout, name=f"head_dropout_{number}")(x)
    if params.head_batch_normalization:
        x = layers.BatchNormalization(name="head_norm")(x)
    probabilities = layers.Dense(classes, activation="softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(images, probabilities, name=f"upsampled_{params.backbone}")


def _backbone(params: ModelParams, size: int) -> Any:
    import keras

    backbone = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(size, size, 3))
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = params.batch_normalization_momentum
    if params.weights is not None:
        _load_weights(backbone, params)
    return backbone


def _load_weights(backbone: Any, params: ModelParams) -> None:
    import keras

    if params.weights == "imagenet":
        path = _fetch_imagenet_weights()
    else:
        path = Path(params.weights).expanduser()
        if not path.is_file():
            raise NightlyError(
                f"model.weights must be 'imagenet', null or the path of a weights file, but '{path}' is not a file"
            )
    if params.weights_sha256 and (digest := sha256_file(path)) != params.weights_sha256:
        raise NightlyError(f"model.weights_sha256 is {params.weights_sha256}, but {path} has {digest}")
    try:
        # Keras only warns about layers that the file does not hold, and leaves them at random.
        with warnings.catch_warnings(action="error", category=UserWarning):
            if path.suffix == ".keras":
                backbone.set_weights(keras.saving.load_model(path, compile=False, safe_mode=True).get_weights())
            else:
                backbone.load_weights(path)
    except (ValueError, OSError, KeyError, UserWarning) as error:
        raise NightlyError(
            f"model.weights: {path} does not fit {params.backbone} without its top: {str(error).splitlines()[0]}"
        ) from None


def _fetch_imagenet_weights() -> Path:
    """Download ImageNet weights into Keras's own cache, or find them there."""
    import keras

    name = IMAGENET_WEIGHTS.rsplit("/", 1)[1]
    try:
        return Path(keras.utils.get_file(name, IMAGENET_WEIGHTS, cache_subdir="models", file_hash=IMAGENET_MD5))
    except Exception as error:  # get_file raises a bare Exception for any network trouble
        raise NightlyError(
            f"model.weights: the ImageNet weights cannot be fetched ({' '.join(str(error).split())[:200]}); bring "
            f"{name} to this machine and set model.weights to its path, or set it to null for random weights"
        ) from None
