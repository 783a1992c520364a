"""Grad-CAM: which parts of a picture raise a class's score (Selvaraju et al. 2017, arXiv 1610.02391, section 3)."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

#: A map of fewer cells a side says hardly where; a network for large images ends in one cell at 32 px.
LEAST_CELLS = 4
#: Pictures computed at once: ResNet50 at 256 px takes about 2 GB for these.
BATCH = 16
#: How much of the picture the hottest place hides in an overlay.
OPACITY = 0.65


class GradCam:
    """A classifier of ``tasks.classifier`` cut in two at a feature map.

    That is the backbone's last one, or, where it has fewer than ``LEAST_CELLS`` a side, the last block's that has as
    many: with one cell there would be nothing to see.

    Attributes:
        layer: name of the layer that gives the feature map.
        cells: its height and width.
        extractor: from uint8 (N, H, W, 3) images to float32 (N, h, w, K) feature maps.
        head: from these to float32 (N, C) scores, which a softmax would make probabilities.
    """

    def __init__(self, classifier: Any) -> None:
        import keras

        place = next(i for i, layer in enumerate(classifier.layers) if layer.name == "pool")
        before, backbone = classifier.layers[place - 2 : place]
        cut = _cut(backbone)
        self.layer, self.cells = cut.name, tuple(cut.output.shape[1:3])
        lower = keras.Model(backbone.input, cut.output, name="lower")
        self.extractor = keras.Model(classifier.input, lower(before.output), name="extractor")
        features = x = keras.Input(cut.output.shape[1:], name="features")
        if cut is not backbone.layers[-1]:
            x = keras.Model(cut.output, backbone.output, name="upper")(x)
        *layers, last = classifier.layers[place:]
        for layer in layers:
            x = layer(x)
        # The score before the softmax, as in the paper: the probability hardly moves where it is near 0 or 1.
        scores = keras.layers.Dense(last.units, name="scores")
        self.head = keras.Model(features, scores(x), name="head")
        scores.set_weights(last.get_weights())
        self._extract, self._gradient = _functions(self.extractor, self.head)

    def heat(self, images: NDArray[np.uint8], classes: Sequence[int]) -> NDArray[np.float32]:
        """Return how far each place of each picture speaks for a class, 0 to 1, the picture's hottest being 1.

        A picture in which nothing speaks for the class is 0 everywhere.

        Args:
            images: uint8 (N, H, W, 3) as the classifier takes them.
            classes: the class (N,) to explain, by index.

        Returns:
            float32 (N, H, W).
        """
        height, width = images.shape[1:3]
        found = np.zeros((len(images), height, width), np.float32)
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            for index, cells in enumerate(self.maps(images[batch], classes[batch]), start):
                # Linear between the cells' centers: the paper only says that the map is enlarged.
                found[index] = cv2.resize(cells, (width, height), interpolation=cv2.INTER_LINEAR)
        hottest = found.max(axis=(1, 2), keepdims=True, initial=0)
        return found / np.where(hottest > 0, hottest, 1)

    def maps(self, images: NDArray[np.uint8], classes: Sequence[int]) -> NDArray[np.float32]:
        """Return equation 2's maps (N, h, w): as small as the feature map, 0 and up, of any scale."""
        features = np.asarray(self._extract(images))
        chosen = np.eye(self.head.output.shape[1], dtype=np.float32)[list(classes)]
        weights = np.asarray(self._gradient(features, chosen)).mean(axis=(1, 2), keepdims=True)  # equation 1
        return np.maximum((weights * features).sum(axis=3), 0)  # equation 2


def overlay(pixels: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return a picture (H, W, 3) with its heat (H, W) laid over it, the more opaque the hotter."""
    opacity = OPACITY * heat[..., np.newaxis]
    return np.rint(pixels * (1 - opacity) + colors(heat) * opacity).astype(np.uint8)


def colors(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return heat (H, W), 0 to 1, as RGB (H, W, 3): black, violet, orange, light yellow."""
    scaled = np.rint(heat * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO)[..., ::-1])


def _cut(backbone: Any) -> Any:
    """Return the layer whose output is the feature map; the whole of the network runs through a block's output."""
    last = backbone.layers[-1]
    if min(last.output.shape[1:3]) >= LEAST_CELLS:
        return last
    blocks = [layer for layer in backbone.layers if layer.name.endswith("_out")]
    return next((layer for layer in reversed(blocks) if min(layer.output.shape[1:3]) >= LEAST_CELLS), last)


def _functions(extractor: Any, head: Any) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]:
    """Return two functions: from images to feature maps, and from these and one-hot classes to the scores' gradient.

    TensorFlow runs them as they are, since compiling takes longer than a few dozen pictures; JAX compiles every single
    operation if it does not compile the whole.
    """
    import keras

    def extract(images: Any) -> Any:
        return extractor(images, training=False)

    def chosen_scores(features: Any, chosen: Any) -> Any:
        return keras.ops.sum(head(features, training=False) * chosen)

    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(extract), jax.jit(jax.grad(chosen_scores))
    import tensorflow as tf

    def gradient(features: Any, chosen: Any) -> Any:
        maps = tf.convert_to_tensor(features)
        with tf.GradientTape() as tape:
            tape.watch(maps)
            score = chosen_scores(maps, chosen)
        return tape.gradient(score, maps)

    return extract, gradient
