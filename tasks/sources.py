"""Labeled images out of the raw archive, one at a time, whatever its layout."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from tasks.archives import read_members
from tasks.errors import NightlyError
from tasks.files import read_json

CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
#: The download stage has held its archive to limits of its own, which parameters may raise.
VERIFIED = {"max_member_bytes": sys.maxsize, "max_total_bytes": sys.maxsize, "max_members": sys.maxsize}
#: Files that people and their systems leave beside images; they are no failures, just no images.
SIDE_FILES = {"thumbs.db", "desktop.ini"}
SIDE_SUFFIXES = {".txt", ".md", ".json", ".csv", ".xml", ".html"}


@dataclass(frozen=True)
class Sample:
    """A source image: ``data`` are its encoded bytes, or ``pixels`` its uint8 (H, W, 3) RGB if it was never encoded."""

    name: str
    data: bytes | None = None
    pixels: np.ndarray | None = None

    @property
    def content_hash(self) -> str:
        """SHA-256 of the bytes, or of the pixels and their shape."""
        if self.data is not None:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Label:
    """What an image's place in the archive says: its class, and ``train`` or ``test`` where the source has splits."""

    class_name: str
    split: str | None


def is_side_file(name: str) -> bool:
    """Tell whether a file is hidden or a usual companion of images rather than an image."""
    path = PurePosixPath(name)
    return (
        any(part.startswith((".", "__MACOSX")) for part in path.parts)
        or path.name.lower() in SIDE_FILES
        or path.suffix.lower() in SIDE_SUFFIXES
    )


def read_samples(raw: Path) -> Iterator[Sample]:
    """Yield every image of the archive in ``raw``, in the archive's order.

    Raises:
        NightlyError: ``raw`` is no output of the download stage, or its archive is damaged.
    """
    facts_file = raw / "source.json"
    if not facts_file.is_file():
        raise NightlyError(f"{raw} has no source.json: run the download stage first ('dvc repro download')")
    facts = read_json(facts_file)
    archive = raw / facts["file"]
    if facts["format"] == "cifar10-binary":
        yield from _cifar10(archive)
    else:
        yield from read_archive(archive, **VERIFIED)


def read_archive(archive: Path, **limits: int) -> Iterator[Sample]:
    """Yield the image files of a tar or zip archive; ``limits`` are those of ``read_members``."""
    for name, data in read_members(archive, **limits):
        if not is_side_file(name):
            yield Sample(name, data=data)


def _cifar10(archive: Path) -> Iterator[Sample]:
    """Yield CIFAR-10's images; their names take the folder layout, ``train/cat/data_batch_1_00042``."""
    members = {PurePosixPath(name).name: data for name, data in read_members(archive, **VERIFIED)}
    classes = members["batches.meta.txt"].decode().split()
    batches = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for batch in batches:
        records = np.frombuffer(members[batch], np.uint8).reshape(-1, CIFAR_RECORD_BYTES)
        split = "test" if batch.startswith("test") else "train"
        for index, record in enumerate(records):
            pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
            name = f"{split}/{classes[record[0]]}/{batch.removesuffix('.bin')}_{index:05d}"
            yield Sample(name, pixels=np.ascontiguousarray(pixels))


def read_labels(names: Iterable[str]) -> dict[str, Label]:
    """Return each file's label, read off ``[top/]<class>/<image>`` or ``[top/]{train,test}/<class>/<image>``.

    Raises:
        NightlyError: a file stands at another depth than that, with its name.
    """
    paths = {name: PurePosixPath(name).parts for name in names}
    first_folders = {parts[0] for parts in paths.values() if len(parts) > 1}
    if len(first_folders) == 1 and all(len(parts) > 2 for parts in paths.values()):
        only = next(iter(first_folders))
        if only not in ("train", "test") or all(len(parts) > 3 for parts in paths.values()):
            paths = {name: parts[1:] for name, parts in paths.items()}
    labels = {}
    for name, parts in paths.items():
        split = parts[0] if len(parts) == 3 and parts[0] in ("train", "test") else None
        if len(parts) != (3 if split else 2):
            raise NightlyError(
                f"'{name}' stands where no class can be read off: images must stand in <class>/<image> or "
                "{train,test}/<class>/<image>, with at most one folder around all of them"
            )
        labels[name] = Label(parts[-2], split)
    return labels
