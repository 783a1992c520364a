"""What tests of random layers share."""

import numpy as np

# All seeds are fixed, so a test passes or fails for good; below this, a law counts as different.
ALPHA = 1e-3


def noise(count: int, height: int = 12, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def run(layer, images: np.ndarray) -> np.ndarray:
    """Return what a layer makes of ``images`` in training."""
    out = np.asarray(layer(images, training=True))
    assert out.dtype == np.uint8
    assert out.shape == images.shape
    return out
