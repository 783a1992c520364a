"""Prepared data: mapped into memory, and how an array begins that is written row by row."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

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


def npy_header(shape: tuple[int, ...], dtype: DTypeLike) -> bytes:
    """Return how an ``.npy`` file begins; the bytes of its rows follow.

    Written, not mapped into memory: where a full disk stops a write with an error, it kills a mapping's owner.
    """
    buffer = io.BytesIO()
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()
