"""Mixup and cutmix: a registered Keras layer on a batch of images and its targets.

Like ``tasks.layers`` this module imports Keras and is only imported inside functions. Everything is vectorized
over the batch and branch-free, with ``keras.ops`` and ``keras.random`` only: any backend, eager or compiled.
"""

import math
from typing import Any

import keras
from keras import ops

from tasks.layers import SeedGenerator


@keras.saving.register_keras_serializable(package="nightly")
class Mix(keras.layers.Layer):
    """Mixes each image and its target with those of another image of the batch, in training only.

    ``mixup_alpha`` blends whole images with a weight from Beta(alpha, alpha) (Zhang et al. 2018, arXiv
    1710.09412); ``cutmix_alpha`` pastes a box of the other image, of such a share of the area, clipped at the
    border (Yun et al. 2019, arXiv 1905.04899). 0 means not at all; with both, each batch draws one of the two.
    The partners are a random permutation of the batch; every image has a weight, and a box, of its own.

    Takes uint8 or float images (N, H, W, 3) and targets (N, C), and gives both as float32, images in 0..255;
    outside training, or with nothing to do, both as they came. Computes in float32 under any dtype policy: in
    bfloat16 a target of 0.9 would be 0.8984.
    """

    def __init__(
        self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**{**kwargs, "dtype": "float32", "autocast": False})
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < math.inf:
                raise ValueError(f"{name} must be 0 or more, but is {alpha}")
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.seed = seed
        self.seed_generator = SeedGenerator(seed)

    def call(self, images: Any, targets: Any, training: bool | None = None) -> tuple[Any, Any]:
        if not training or not (self.mixup_alpha or self.cutmix_alpha):
            return images, targets
        images, targets = ops.cast(images, "float32"), ops.cast(targets, "float32")
        count, height, width, _ = ops.shape(images)
        weight = self.draw_weights(count, height, width)
        # Not keras.random.shuffle: JAX's cannot be traced while the size of the batch is unknown.
        partner = ops.argsort(self._draw(count))
        share = ops.mean(weight, axis=(1, 2))
        return _blend(images, partner, weight), _blend(targets, partner, share)

    def draw_weights(self, count: Any, height: int, width: int) -> Any:
        """Return the weight of each image in its own mixture: float32 (N, 1, 1, 1) or, by pixel, (N, H, W, 1)."""
        if not self.cutmix_alpha:
            return self._mixup_weights(count)
        if not self.mixup_alpha:
            return self._cutmix_weights(count, height, width)
        mixup = self._draw(1, 1, 1, 1) < 0.5
        return ops.where(mixup, self._mixup_weights(count), self._cutmix_weights(count, height, width))

    def draw_beta(self, alpha: float, count: Any) -> Any:
        """Return float32 (N, 1) draws from Beta(alpha, alpha).

        If T has Student's t-distribution with 2 alpha degrees of freedom, (1 + T / sqrt(2 alpha + T²)) / 2 has
        this law; T comes from two uniforms by Bailey's polar method (Mathematics of Computation 62, 1994),
        exact for any alpha: T² = 2 alpha (U^(-1/alpha) - 1) cos²(2 pi V), with the cosine's sign. Neither
        ``keras.random.beta`` nor ``gamma`` will do: XLA cannot compile TensorFlow's sampler.
        """
        draws = self._draw(count, 2)
        power = (1 - draws[:, :1]) ** (1 / alpha)
        cosine = ops.cos(2 * math.pi * draws[:, 1:])
        # 2 alpha / (2 alpha + T²); the bound keeps 0 / 0 away where a tiny alpha lets the power underflow.
        rest = power / ops.maximum(power + (1 - power) * ops.square(cosine), 1e-37)
        # (1 - sqrt(1 - rest)) / 2 without its cancellation.
        lesser = rest / (2 * (1 + ops.sqrt(1 - rest)))
        return ops.where(cosine < 0, lesser, 1 - lesser)

    def _mixup_weights(self, count: Any) -> Any:
        return ops.reshape(self.draw_beta(self.mixup_alpha, count), (-1, 1, 1, 1))

    def _cutmix_weights(self, count: Any, height: int, width: int) -> Any:
        side = ops.sqrt(1 - self.draw_beta(self.cutmix_alpha, count))
        center = self._draw(count, 2)
        rows, columns = _span(center[:, :1], side, height), _span(center[:, 1:], side, width)
        box = ops.logical_and(ops.expand_dims(rows, 2), ops.expand_dims(columns, 1))
        return 1 - ops.expand_dims(ops.cast(box, "float32"), 3)

    def _draw(self, *shape: Any) -> Any:
        """Return float32 draws from [0, 1), whatever the global float type."""
        return keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)

    def get_config(self) -> dict[str, Any]:
        config = {"mixup_alpha": self.mixup_alpha, "cutmix_alpha": self.cutmix_alpha, "seed": self.seed}
        return {**super().get_config(), **config}


def _blend(values: Any, partner: Any, weight: Any) -> Any:
    """Return weight · own + (1 - weight) · partner's, rounded so that it never leaves their range."""
    others = ops.take(values, partner, axis=0)
    return others + weight * (values - others)


def _span(center: Any, side: Any, size: int) -> Any:
    """Return a mask (N, size) of the pixels between the rounded ends of a line, clipped; all are shares of size."""
    start = ops.cast(ops.round((center - side / 2) * size), "int32")
    stop = ops.cast(ops.round((center + side / 2) * size), "int32")
    index = ops.expand_dims(ops.arange(size, dtype="int32"), 0)
    return ops.logical_and(index >= start, index < stop)
