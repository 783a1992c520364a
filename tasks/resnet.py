"""Residual networks and their plain twins, without a top: He et al. 2015, arXiv 1512.03385, table 1 and section 4.2."""

import math
from dataclasses import dataclass
from typing import Any

#: That of the published ImageNet weights.
EPSILON = 1.001e-5


@dataclass(frozen=True)
class Network:
    """A column of the paper's table.

    Attributes:
        blocks: how many in each stage; a stage after the first halves the size and doubles the filters.
        bottleneck: blocks of 1×1, 3×3 and 1×1 convolutions instead of two of 3×3.
        residual: false for a plain network, the same layers without the shortcuts.
        cifar: for images of about 32 px: three stages from 16 filters, no early shrinking, shortcuts without weights.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = False
    residual: bool = True
    cifar: bool = False


_IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NETWORKS = {
    **{f"resnet{depth}": Network(blocks, bottleneck=depth >= 50) for depth, blocks in _IMAGENET_BLOCKS.items()},
    **{f"plain{depth}": Network(_IMAGENET_BLOCKS[depth], residual=False) for depth in (18, 34)},
    # 6n + 2 layers: n blocks of two in each of three stages, the first convolution and the fully connected layer.
    **{f"resnet{6 * n + 2}": Network((n, n, n), cifar=True) for n in (3, 5, 7, 9, 18)},
    **{f"plain{6 * n + 2}": Network((n, n, n), residual=False, cifar=True) for n in (3, 5, 7, 9)},
}


def minimum_size(name: str) -> int:
    """Return the smallest image in pixels that still leaves one pixel after the last stage: the total stride."""
    return 4 if NETWORKS[name].cifar else 32


def build_backbone(
    name: str,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    batch_normalization_momentum: float = 0.99,
) -> Any:
    """Return network ``name`` of ``NETWORKS`` as a Keras model from (N, H, W, 3) to its last feature map.

    resnet50, resnet101 and resnet152 are those of ``keras.applications`` layer for layer and name for name, so
    their published weights fit: the stride on a block's first 1×1 convolution, biases that BatchNormalization
    makes superfluous, zeros padded evenly on both sides. The others follow suit, but for the biases.

    A shortcut whose shape changes is a projection (the paper's option B); in the networks for CIFAR it takes
    every second pixel and pads the channels with zeros (option A). All convolutions begin as in He et al. 2015b
    (arXiv 1502.01852), not with Keras's Glorot: plain networks of this depth would hardly train.
    """
    import keras

    network = NETWORKS[name]
    builder = _Builder(network, batch_normalization_momentum)
    images = keras.Input(input_shape, name="images")
    if network.cifar:
        filters = 16
        x = builder.convolve(images, "conv1", filters, size=3)
    else:
        filters = 64
        x = builder.convolve(images, "conv1", filters, size=7, stride=2)
        x = keras.layers.ZeroPadding2D(1, name="pool1_pad")(x)
        x = keras.layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for stage, blocks in enumerate(network.blocks):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            x = builder.block(x, f"conv{stage + 2}_block{block + 1}", filters * 2**stage, stride)
    return keras.Model(images, x, name=name)


class _Builder:
    """The parts of one network, with the layer names of ``keras.applications``."""

    def __init__(self, network: Network, momentum: float) -> None:
        self._network = network
        self._momentum = momentum

    def convolve(self, x: Any, name: str, filters: int, size: int, stride: int = 1, relu: bool = True) -> Any:
        """Append convolution, BatchNormalization and ReLU."""
        from keras import layers

        if size > 1 and stride > 1:
            # Keras's "same" would pad such a convolution on one side only, half a step off the shortcut beside it.
            x = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        x = layers.Conv2D(
            filters,
            size,
            strides=stride,
            padding="same" if stride == 1 else "valid",
            use_bias=self._network.bottleneck,
            kernel_initializer="he_normal",
            name=f"{name}_conv",
        )(x)
        x = layers.BatchNormalization(momentum=self._momentum, epsilon=EPSILON, name=f"{name}_bn")(x)
        return layers.Activation("relu", name=f"{name}_relu")(x) if relu else x

    def block(self, x: Any, name: str, filters: int, stride: int) -> Any:
        """Append the block's convolutions, and its shortcut unless the network is plain."""
        from keras import layers

        shapes = [(filters, 1), (filters, 3), (4 * filters, 1)] if self._network.bottleneck else [(filters, 3)] * 2
        shortcut = self._shortcut(x, name, shapes[-1][0], stride) if self._network.residual else None
        for number, (width, size) in enumerate(shapes, start=1):
            last = number == len(shapes)
            x = self.convolve(x, f"{name}_{number}", width, size, stride if number == 1 else 1, relu=not last)
        if shortcut is not None:
            x = layers.Add(name=f"{name}_add")([shortcut, x])
        return layers.Activation("relu", name=f"{name}_out")(x)

    def _shortcut(self, x: Any, name: str, channels: int, stride: int) -> Any:
        from keras import layers

        missing = channels - x.shape[-1]
        if stride == 1 and not missing:
            return x
        if not self._network.cifar:
            return self.convolve(x, f"{name}_0", channels, size=1, stride=stride, relu=False)
        # A pool of one pixel takes every second one.
        x = layers.MaxPooling2D(1, strides=stride, name=f"{name}_0_pool")(x)
        # "channels_first" pads the last two axes, which here are width and channels.
        padding = ((0, 0), (0, missing))
        return layers.ZeroPadding2D(padding, data_format="channels_first", name=f"{name}_0_pad")(x)


def multiply_adds(model: Any) -> int:
    """Return the multiply-adds that one image costs in the convolutions and dense layers of a Keras model.

    The paper calls them FLOPs. Every place of a layer's output costs as much as its kernel has weights.

    Raises:
        ValueError: the model's image size is not fixed.
    """
    import keras

    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            total += multiply_adds(layer)
        elif isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            places = layer.output.shape[1:-1]
            if None in places:
                raise ValueError(f"{model.name} must have one image size, but {layer.name} gives {layer.output.shape}")
            total += math.prod(places) * math.prod(layer.kernel.shape)
    return total
