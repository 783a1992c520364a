"""Registered Keras layers on raw pixels: the random augmentations and the model's own normalization.

The augmentations take and give uint8 ``(N, H, W, 3)``, so that a model sees the very same dtype in training
as in serving. Each image has its own draw, everything is vectorized over the batch, and nothing happens
unless ``training`` is true. Only ``keras.ops`` and ``keras.random`` are used: any backend, eager or compiled.
"""

from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops


class SeedGenerator(keras.random.SeedGenerator):
    """Keras's, with other draws on each of several devices.

    TensorFlow's replicas share a generator's state, and would all augment their shares of a batch alike.
    """

    def next(self, ordered: bool = True) -> Any:
        seed = super().next(ordered)
        if keras.backend.backend() != "tensorflow":
            return seed
        import tensorflow as tf

        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return seed
        return seed + tf.stack([0, tf.cast(replica.replica_id_in_sync_group, seed.dtype) * 2**32])


class _RandomPixels(keras.layers.Layer):
    """Base of the augmentations: a seed of its own, and the identity outside training."""

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        self.seed_generator = SeedGenerator(seed)

    def call(self, images: Any, training: bool | None = None) -> Any:
        _require_uint8(self, images)
        return self.transform(images) if training else images

    def transform(self, images: Any) -> Any:
        """Return the augmented images, same shape and dtype."""
        raise TypeError(f"{type(self).__name__} must define 'transform'")

    def draw(self, *shape: Any) -> Any:
        """Return float32 draws from [0, 1), whatever the global or the layer's float type."""
        return keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "seed": self.seed}


@keras.saving.register_keras_serializable(package="nightly")
class RandomFlip(_RandomPixels):
    """Mirrors an image with probability 1/2 for each direction asked for, independently."""

    def __init__(self, horizontal: bool = True, vertical: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.horizontal = horizontal
        self.vertical = vertical

    def transform(self, images: Any) -> Any:
        chosen = self.draw(ops.shape(images)[0], 2, 1, 1, 1) < 0.5
        if self.horizontal:
            images = ops.where(chosen[:, 0], ops.flip(images, axis=2), images)
        if self.vertical:
            images = ops.where(chosen[:, 1], ops.flip(images, axis=1), images)
        return images

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "horizontal": self.horizontal, "vertical": self.vertical}


@keras.saving.register_keras_serializable(package="nightly")
class RandomShift(_RandomPixels):
    """Moves an image by whole pixels, uniform in [-pixels, pixels] on both axes: pad by k, then crop.

    Args:
        pixels: the largest shift; smaller than the image.
        fill: what comes in over the edge: ``reflect``, the image mirrored at its border pixel; ``edge``, the
            border pixel repeated; ``constant``, black.
    """

    def __init__(
        self, pixels: int = 0, fill: Literal["reflect", "edge", "constant"] = "reflect", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if pixels < 0:
            raise ValueError(f"pixels must be 0 or more, but is {pixels}")
        if fill not in ("reflect", "edge", "constant"):
            raise ValueError(f"fill must be 'reflect', 'edge' or 'constant', but is {fill!r}")
        self.pixels = pixels
        self.fill = fill

    def build(self, input_shape: Sequence[int | None]) -> None:
        height, width = _image_size(self, input_shape)
        if self.pixels >= min(height, width):
            raise ValueError(f"pixels must be below the image's {min(height, width)}, but is {self.pixels}")

    def transform(self, images: Any) -> Any:
        if not self.pixels:
            return images
        count, height, width, channels = ops.shape(images)
        offsets = _below(self.draw(count, 2, 1), 2 * self.pixels + 1) - self.pixels
        rows, rows_inside = self._sources(offsets[:, 0], height)
        columns, columns_inside = self._sources(offsets[:, 1], width)
        # One gather of whole pixels, indexed in the flattened batch: no padded copy, no loop over images.
        first_row = ops.expand_dims(ops.arange(count, dtype="int32") * height, 1)
        flat = ops.expand_dims((first_row + rows) * width, 2) + ops.expand_dims(columns, 1)
        moved = ops.take(ops.reshape(images, (-1, channels)), flat, axis=0)
        if self.fill != "constant":
            return moved
        return ops.where(_outer(rows_inside, columns_inside), moved, ops.zeros_like(moved))

    def _sources(self, offset: Any, size: int) -> tuple[Any, Any]:
        """Return the source index of each line, and whether it lies inside the image, both (N, size)."""
        wanted = ops.expand_dims(ops.arange(size, dtype="int32"), 0) + offset
        inside = ops.logical_and(wanted >= 0, wanted < size)
        if self.fill == "reflect":
            return size - 1 - ops.abs(size - 1 - ops.abs(wanted)), inside
        return ops.clip(wanted, 0, size - 1), inside

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "pixels": self.pixels, "fill": self.fill}


@keras.saving.register_keras_serializable(package="nightly")
class RandomErasing(_RandomPixels):
    """Fills a random rectangle of an image with probability ``p`` (Zhong et al. 2017, arXiv 1708.04896).

    The law is that of the rejection sampler ``get_random_eraser`` (yu4u/cutout-random-erasing, which the
    notebook uses) without its loop: :func:`rectangle_law` gives the exact law of the accepted height and
    width, from which the layer draws by inverse cumulated probabilities; given the size, every position that
    fits is equally likely. The sampler fills with floats; ours are these floats rounded to the nearest pixel.

    Args:
        p: probability that an image is erased.
        s_l, s_h: bounds of the area, as a fraction of the image's.
        r_1, r_2: bounds of the aspect ratio, height / width.
        v_l, v_h: bounds of the fill value, 0..255.
        pixel_level: fill with noise (each pixel and channel its own value) instead of one gray.
    """

    def __init__(
        self,
        p: float = 0.5,
        s_l: float = 0.02,
        s_h: float = 0.4,
        r_1: float = 0.3,
        r_2: float = 1 / 0.3,
        v_l: float = 0,
        v_h: float = 255,
        pixel_level: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in 0..1, but is {p}")
        if not 0 <= v_l <= v_h <= 255:
            raise ValueError(f"0 <= v_l <= v_h <= 255 must hold, but v_l is {v_l} and v_h is {v_h}")
        self.p = p
        self.s_l, self.s_h = s_l, s_h
        self.r_1, self.r_2 = r_1, r_2
        self.v_l, self.v_h = v_l, v_h
        self.pixel_level = pixel_level

    def build(self, input_shape: Sequence[int | None]) -> None:
        height, width = _image_size(self, input_shape)
        law = rectangle_law(height, width, self.s_l, self.s_h, self.r_1, self.r_2)
        # First the height, then the width given the height: with one draw for both, float32's 2^-23 would be
        # coarse beside the cells of a large image's table.
        self._heights = _cumulated(law.sum(axis=1)).astype("float32")
        self._widths = _cumulated(law).astype("float32")
        # The tables belong to this image size.
        self.input_spec = keras.layers.InputSpec(shape=(None, height, width, input_shape[3]))

    def transform(self, images: Any) -> Any:
        if not self.p:
            return images
        count, height, width, channels = ops.shape(images)
        top, left, h, w = self.draw_rectangles(count, height, width)
        erased = _outer(_between(top, top + h, height), _between(left, left + w, width))
        values = self.draw(count, height, width, channels) if self.pixel_level else self.draw(count, 1, 1, 1)
        fill = ops.cast(ops.round(self.v_l + values * (self.v_h - self.v_l)), "uint8")
        return ops.where(erased, fill, images)

    def draw_rectangles(self, count: Any, height: int, width: int) -> tuple[Any, Any, Any, Any]:
        """Return top, left, height, width in pixels, each int32 (N, 1); height 0 where nothing is erased."""
        u = self.draw(5, count, 1)
        h = _inverse(ops.convert_to_tensor(self._heights), u[0])
        w = _inverse(ops.take(ops.convert_to_tensor(self._widths), h[:, 0], axis=0), u[1])
        # An empty side may lie anywhere but after the last pixel: size - 0 + 1 places would be one too many.
        top = _below(u[2], ops.minimum(height - h + 1, height))
        left = _below(u[3], ops.minimum(width - w + 1, width))
        return top, left, ops.where(u[4] < self.p, h, ops.zeros_like(h)), w

    def get_config(self) -> dict[str, Any]:
        names = ("p", "s_l", "s_h", "r_1", "r_2", "v_l", "v_h", "pixel_level")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="nightly")
class Normalize(keras.layers.Layer):
    """Turns uint8 RGB pixels into what the network computes with: ``(x - mean) / std``, in float32.

    Every saved model starts with it. The cast to the compute dtype comes last, so that mixed precision rounds
    the result once instead of rounding pixels and mean apart.

    Args:
        mean, std: three numbers each, in pixel values 0..255 and in the input's order R, G, B.
        reverse_channels: give B, G, R; done after mean and std, which stay in RGB order.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], reverse_channels: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must hold three numbers each, but are {mean} and {std}")
        if min(std) <= 0:
            raise ValueError(f"std must be above 0, but is {std}")
        self.mean = [float(value) for value in mean]
        self.std = [float(value) for value in std]
        self.reverse_channels = reverse_channels

    def call(self, images: Any) -> Any:
        _require_uint8(self, images)
        mean, std = (np.asarray(values, "float32") for values in (self.mean, self.std))
        normalized = (ops.cast(images, "float32") - mean) / std
        if self.reverse_channels:
            normalized = ops.flip(normalized, axis=3)
        return ops.cast(normalized, self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config = {"mean": self.mean, "std": self.std, "reverse_channels": self.reverse_channels}
        return {**super().get_config(), **config}


def rectangle_law(height: int, width: int, s_l: float, s_h: float, r_1: float, r_2: float) -> np.ndarray:
    """Return the probability of each size (h, w) that ``get_random_eraser`` ends up with, as a table.

    The sampler draws s uniform in [s_l, s_h] · height · width and r uniform in [r_1, r_2], takes h = ⌊√(s r)⌋
    and w = ⌊√(s / r)⌋ and a corner uniform over the image, and starts anew until the rectangle fits. Hence

        P(h, w) ∝ Q(h, w) · min(height - h + 1, height) / height · min(width - w + 1, width) / width

    with Q(h, w) the share of the (s, r) box in which h ≤ √(s r) < h + 1 and w ≤ √(s / r) < w + 1. The minimum
    is for empty sides (tiny images), which fit wherever they are.

    Returns:
        float64 (height + 1, width + 1), sums to 1.

    Raises:
        ValueError: the bounds are not in order, or no rectangle can fit (where the sampler loops for ever).
    """
    if not 0 < s_l <= s_h <= 1:
        raise ValueError(f"0 < s_l <= s_h <= 1 must hold, but s_l is {s_l} and s_h is {s_h}")
    if not 0 < r_1 <= r_2:
        raise ValueError(f"0 < r_1 <= r_2 must hold, but r_1 is {r_1} and r_2 is {r_2}")
    s_l, s_h = s_l * height * width, s_h * height * width
    if s_l == s_h and r_1 == r_2:
        proposed = np.zeros((height + 1, width + 1))
        h, w = int(np.sqrt(s_l * r_1)), int(np.sqrt(s_l / r_1))
        if h <= height and w <= width:
            proposed[h, w] = 1
    else:
        below = np.zeros((height + 2, width + 2))
        sides = np.arange(1.0, width + 2)
        for x in range(1, height + 2):
            below[x, 1:] = _share_below(float(x), sides, (s_l, s_h), (r_1, r_2))
        proposed = np.diff(np.diff(below, axis=0), axis=1).clip(min=0)
    places_down = np.minimum(height - np.arange(height + 1) + 1, height) / height
    places_across = np.minimum(width - np.arange(width + 1) + 1, width) / width
    law = proposed * np.outer(places_down, places_across)
    # Differences of shares leave dust of about 1e-16 where nothing is possible.
    law[law < 1e-13] = 0
    if not law.sum():
        raise ValueError(
            f"no rectangle fits into an image of {height} x {width} pixels with an area of "
            f"{s_l:g} to {s_h:g} pixels (s_l, s_h) and an aspect of {r_1:g} to {r_2:g} (r_1, r_2)"
        )
    return law / law.sum()


def _share_below(x: float, y: np.ndarray, area: tuple[float, float], aspect: tuple[float, float]) -> np.ndarray:
    """Return the share of the (s, r) box where √(s r) < x and √(s / r) < y, for every y.

    Both hold where s < min(x² / r, y² r). With s and r spread, the share is the integral over r of
    max(0, min(s_h, x² / r, y² r) - s_l). Between the places where two of its terms are equal, the minimum is
    one of them, whose integral is elementary: the sum over these pieces is exact.
    """
    (s_l, s_h), (r_1, r_2) = area, aspect
    if r_1 == r_2:
        return (np.minimum(x * x / r_1, y * y * r_1).clip(s_l, s_h) - s_l) / (s_h - s_l)
    if s_l == s_h:
        # One area: r must lie above s / y² and below x² / s.
        from_r, to_r = (s_l / y**2).clip(r_1, r_2), np.clip(x * x / s_l, r_1, r_2)
        return (to_r - from_r).clip(min=0) / (r_2 - r_1)
    one = np.ones_like(y)
    edges = [x * x / s_h * one, x * x / s_l * one, s_h / y**2, s_l / y**2, x / y, r_1 * one, r_2 * one]
    edges = np.sort(np.clip(edges, r_1, r_2), axis=0)
    a, b = edges[:-1], edges[1:]
    middle = (a + b) / 2
    least = np.argmin([s_h * np.ones_like(middle), x * x / middle, y**2 * middle], axis=0)
    pieces = np.choose(least, [s_h * (b - a), x * x * np.log(b / a), y**2 * (b**2 - a**2) / 2])
    return (pieces - s_l * (b - a)).clip(min=0).sum(axis=0) / ((s_h - s_l) * (r_2 - r_1))


def _cumulated(weights: np.ndarray) -> np.ndarray:
    """Return the cumulated probabilities along the last axis; rows of zeros stay zeros."""
    totals = np.cumsum(weights, axis=-1)
    return totals / np.where(totals[..., -1:] > 0, totals[..., -1:], 1)


def _inverse(cumulated: Any, u: Any) -> Any:
    """Return the first index whose cumulated probability exceeds ``u`` (N, 1), as int32 (N, 1)."""
    return ops.sum(ops.cast(cumulated <= u, "int32"), axis=-1, keepdims=True)


def _below(u: Any, bound: Any) -> Any:
    """Turn draws from [0, 1) into whole numbers 0..bound-1, equally likely."""
    scaled = ops.cast(ops.floor(u * ops.cast(bound, "float32")), "int32")
    return ops.minimum(scaled, bound - 1)


def _between(start: Any, stop: Any, size: int) -> Any:
    """Return a mask (N, size), true from ``start`` (N, 1) up to before ``stop`` (N, 1)."""
    index = ops.expand_dims(ops.arange(size, dtype="int32"), 0)
    return ops.logical_and(index >= start, index < stop)


def _outer(rows: Any, columns: Any) -> Any:
    """Return the mask (N, H, W, 1) of the pixels whose row and column are both masked."""
    both = ops.logical_and(ops.expand_dims(rows, 2), ops.expand_dims(columns, 1))
    return ops.expand_dims(both, 3)


def _require_uint8(layer: keras.layers.Layer, images: Any) -> None:
    dtype = keras.backend.standardize_dtype(images.dtype)
    if dtype != "uint8":
        raise ValueError(f"{layer.name} takes uint8 pixels 0..255, but got {dtype}")


def _image_size(layer: keras.layers.Layer, input_shape: Sequence[int | None]) -> tuple[int, int]:
    """Return height and width of ``(N, H, W, 3)``, which must be known when the layer is built."""
    if len(input_shape) != 4 or input_shape[1] is None or input_shape[2] is None:
        raise ValueError(f"{layer.name} takes images of one known size (N, H, W, 3), but got {tuple(input_shape)}")
    return input_shape[1], input_shape[2]
