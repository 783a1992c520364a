"""The network: uint8 pixels, normalization, upsampling, a residual backbone, a head, class probabilities."""

from typing import Any, Literal

from pydantic import Field, field_validator

from tasks.errors import NightlyError
from tasks.params import Section
from tasks.resnet import NETWORKS, build_backbone, minimum_size
from tasks.weights import find_weights, load_weights


class ModelParams(Section):
    """The network's shape.

    Attributes:
        backbone: resnet18 to resnet152, plain18 and plain34 are for images of 32 px or more as the backbone sees them,
            better 128 and up; resnet20 to resnet110 and plain20 to plain56 are for small images.
        weights: null for random ones, ``imagenet`` (resnet50, resnet101, resnet152), or the path of a ``.h5``,
            ``.weights.h5`` or ``.keras`` file that fits the backbone without its top, or of a whole model of ours
            (``.keras``).
        weights_sha256: of that file, 64 hex digits.
        doublings: times that the image is upsampled by 2, inside the model: three turn CIFAR-10's 32 px into 256 px.
        interpolation: how it is upsampled.
        pool: what the head gets: the mean of the backbone's last feature map (``avg``), or all of it (``flatten``).
        head_units: widths of the dense ReLU layers between the pooled features and the softmax.
        head_batch_normalization: one before each of the head's dense layers, the softmax's included.
        dropout: share of units dropped after each of ``head_units``, in training.
        batch_normalization_momentum: the backbone's. Keras's 0.99 needs several hundred steps before the moving
            averages mean anything, so short runs want 0.9.
    """

    backbone: Literal[*NETWORKS] = "resnet50"
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


def build_classifier(
    params: ModelParams,
    image_size: int,
    classes: int,
    normalization: dict[str, Any],
    *,
    frozen: bool = False,
    freeze_batch_normalization: bool = False,
) -> Any:
    """Return a Keras model from uint8 (N, image_size, image_size, 3) RGB to float32 (N, classes) probabilities.

    Args:
        normalization: ``mean``, ``std`` and ``channel_order`` as in ``normalization.json``.
        frozen: the backbone does not train.
        freeze_batch_normalization: the backbone's convolutions train, its BatchNormalization does not.

    A frozen BatchNormalization also stops normalizing by the batch and keeps its moving averages. That is what
    ``trainable = False`` means to it; calling the backbone with ``training=False`` would not do, since Keras
    overrides it with the ``training=True`` of a fit.

    The last layer computes in float32 under any precision: a softmax in half precision loses the small
    probabilities that the loss is made of.

    Raises:
        NightlyError: the upsampled image is too small for the backbone, or the weights do not fit.
    """
    import keras
    from keras import layers

    from tasks.layers import Normalize

    upsampled = image_size * 2**params.doublings
    if upsampled < (minimum := minimum_size(params.backbone)):
        raise NightlyError(
            f"model.doublings {params.doublings} of {image_size} px give {upsampled} px, but {params.backbone} needs "
            f"{minimum} px or more: raise model.doublings or prepare.decode.size"
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
    backbone = _backbone(params, upsampled)
    if frozen:
        backbone.trainable = False
    elif freeze_batch_normalization:
        for layer in backbone.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.trainable = False
    x = backbone(x)
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


def split_at_pool(classifier: Any) -> tuple[Any, Any]:
    """Return two models that are the classifier when one follows the other, made of its own layers and weights.

    Training the second is training the classifier's head; the first is what it takes from the backbone.

    Returns:
        From uint8 (N, H, W, 3) images to float32 (N, F) pooled features, and from these to (N, C) probabilities.
    """
    import keras

    pool = classifier.get_layer("pool")
    # Under mixed precision the features come in half; float32 holds them exactly, and the head casts them back.
    pooled = keras.layers.Identity(dtype="float32", name="features")(pool.output)
    extractor = keras.Model(classifier.input, pooled, name="extractor")
    features = keras.Input(pooled.shape[1:], dtype="float32", name="features")
    x = features
    for layer in classifier.layers[classifier.layers.index(pool) + 1 :]:
        x = layer(x)
    return extractor, keras.Model(features, x, name="head")


def _backbone(params: ModelParams, size: int) -> Any:
    backbone = build_backbone(params.backbone, (size, size, 3), params.batch_normalization_momentum)
    if params.weights is not None:
        load_weights(backbone, find_weights(params.backbone, params.weights, params.weights_sha256))
    return backbone
