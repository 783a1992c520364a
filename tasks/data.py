"""Reading prepared data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.errors import NightlyError


@dataclass(frozen=True)
class Split:
    """A memory-mapped split: uint8 (N, H, W, 3) images, float32 (N, C) one-hot targets."""

    images: np.ndarray
    targets: np.ndarray


def load_split(prepared: Path, name: str) -> Split:
    """Map split ``name`` of the prepared data into memory."""
    folder = prepared / name
    if not (folder / "images.npy").is_file():
        raise NightlyError(f"{folder} has no images.npy: run the prepare stage first ('dvc repro prepare')")
    return Split(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "targets.npy", mmap_mode="r"))
