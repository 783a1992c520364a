"""What is counted of images, so that two folders can be compared: sums over statistics, features and probabilities."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks.errors import NightlyError
from tasks.files import publish_file

STATISTICS = ("red_mean", "green_mean", "blue_mean", "red_std", "green_std", "blue_std")
#: What people see of those six. Contrast is the mean standard deviation; saturation is HSV's, of the mean color; red,
#: green and blue are chromaticities, the channel's share of the light, which darkening leaves alone.
LOOKS = ("brightness", "contrast", "saturation", "red", "green", "blue")
CONFIDENCE_BINS = 20
#: One gray level. Images that varied less than that in the reference did not vary.
SMALLEST_STD = 1 / 255


def image_statistics(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return ``STATISTICS``, float32 ``(6,)`` as shares of 255, of one uint8 ``(H, W, 3)`` RGB image."""
    return (np.concatenate(cv2.meanStdDev(pixels)).ravel() / 255).astype(np.float32)


def _sums() -> NDArray[np.float64]:
    return np.zeros((2, 0))


@dataclass(eq=False)
class Tally:
    """Sums over images, which can be merged; an empty one takes on the shape of the first it is given.

    Floating-point sums depend on their order in the last bits: shards merged in their order give the same bits
    whoever computed which, and facts are rounded far above what another order or batch size changes.

    Attributes:
        images: float64 ``(2, 12)``, sums and sums of squares of ``STATISTICS`` and ``LOOKS``.
        features: the same of the pooled features ``(2, F)``; F is 0 where there are none.
        confidence: the same of the largest probability ``(2, 1)``.
        labels: int64 ``(C,)``, images by predicted class.
        histogram: int64 ``(20,)``, images by confidence in bins of equal width.
    """

    count: int = 0
    images: NDArray[np.float64] = field(default_factory=_sums)
    features: NDArray[np.float64] = field(default_factory=_sums)
    confidence: NDArray[np.float64] = field(default_factory=_sums)
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, statistics: NDArray, features: NDArray | None, probabilities: NDArray) -> None:
        """Count n images: rows of ``image_statistics`` ``(n, 6)``, features ``(n, F)``, probabilities ``(n, C)``.

        Raises:
            NightlyError: a value is infinite or not a number.
        """
        features = np.zeros((len(statistics), 0)) if features is None else features
        given = {"image statistics": statistics, "features": features, "probabilities": probabilities}
        for name, values in given.items():
            if bad := np.size(values) - np.count_nonzero(np.isfinite(values)):
                raise NightlyError(f"{name} must be finite numbers, but {bad} of {np.size(values)} are not")
        confidence = np.asarray(probabilities, np.float64).max(axis=1, keepdims=True)
        bins = np.minimum((confidence[:, 0] * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
        labels = np.argmax(probabilities, axis=1)
        self.merge(
            Tally(
                len(statistics),
                _sum_up(_with_looks(statistics)),
                _sum_up(features),
                _sum_up(confidence),
                np.bincount(labels, minlength=np.shape(probabilities)[1]),
                np.bincount(bins, minlength=CONFIDENCE_BINS),
            )
        )

    def merge(self, other: "Tally") -> None:
        """Count the images of another tally as well."""
        if not other.count:
            return
        mine, theirs = self._arrays(), other._arrays()
        if self.count and (differing := [name for name in mine if mine[name].shape != theirs[name].shape]):
            raise ValueError(f"tallies of different models: {', '.join(differing)} differ in shape")
        for name, array in theirs.items():
            setattr(self, name, mine[name] + array if self.count else array)
        self.count += other.count

    def to_bytes(self) -> bytes:
        """Return an npz file without pickle; the same tally gives the same bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, count=np.int64(self.count), **self._arrays())
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the tally that ``to_bytes`` was called on.

        Raises:
            NightlyError: these are no such bytes.
        """
        try:
            with np.load(io.BytesIO(data)) as arrays:
                return cls(int(arrays["count"]), **{name: arrays[name] for name in cls()._arrays()})
        except (BadZipFile, EOFError, KeyError, RuntimeError, ValueError) as error:
            raise NightlyError(f"drift statistics are damaged: {' '.join(str(error).split())}") from None

    def save(self, path: Path) -> None:
        """Write ``to_bytes`` to ``path``, all of it or nothing."""
        with publish_file(path) as partial:
            partial.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the tally in a file that ``save`` wrote.

        Raises:
            NightlyError: the file is damaged.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except NightlyError as error:
            raise NightlyError(f"{path}: {error}") from None

    def _arrays(self) -> dict[str, NDArray]:
        return {name: value for name, value in vars(self).items() if name != "count"}


def _with_looks(statistics: NDArray) -> NDArray[np.float64]:
    """Return float64 ``(n, 12)``: ``STATISTICS`` and ``LOOKS`` of each image."""
    statistics = np.asarray(statistics, np.float64)
    means, deviations = statistics[:, :3], statistics[:, 3:]
    # One gray level of white light more: black has no color, and the noise in near black has little.
    lit = means + SMALLEST_STD
    looks = [means.mean(axis=1), deviations.mean(axis=1), 1 - lit.min(axis=1) / lit.max(axis=1)]
    return np.column_stack([statistics, *looks, lit / lit.sum(axis=1, keepdims=True)])


def _sum_up(values: NDArray) -> NDArray[np.float64]:
    """Return sums and sums of squares ``(2, F)`` of the columns of ``(n, F)``."""
    values = np.asarray(values, np.float64)
    return np.stack([values.sum(axis=0), (values**2).sum(axis=0)])
