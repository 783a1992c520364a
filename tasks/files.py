"""Files that are either complete or absent: everything is written aside and renamed into place."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def partial_path(destination: Path) -> Path:
    """Return the name under which ``destination`` is written before it is complete."""
    return _aside(destination, "partial")


@contextmanager
def publish_file(destination: Path) -> Iterator[Path]:
    """Yield a path to write to; rename it to ``destination`` if the block ends well, else remove it."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    tidy_up(destination)
    partial = partial_path(destination)
    try:
        yield partial
        sync(partial)
        partial.replace(destination)
        sync(destination.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def publish_directory(destination: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; it becomes ``destination`` if the block ends well.

    An older ``destination`` stays readable until the new one is complete.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    tidy_up(destination)
    partial = partial_path(destination)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        replace_directory(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_directory(complete: Path, destination: Path) -> None:
    """Rename the directory ``complete`` to ``destination``; an older one stays readable until then."""
    old = _aside(destination, "old")
    if destination.exists():
        destination.rename(old)
    complete.rename(destination)
    sync(destination.parent)
    shutil.rmtree(old, ignore_errors=True)


def _aside(destination: Path, kind: str) -> Path:
    return destination.with_name(f".{destination.name}.{kind}-{os.getpid()}")


def tidy_up(destination: Path) -> None:
    """Remove what killed processes left beside ``destination``; put an old one back that they moved aside."""
    for kind in ("old", "partial"):
        for left in destination.parent.glob(f".{glob.escape(destination.name)}.{kind}-*"):
            owner = left.name.rpartition("-")[2]
            if owner.isdigit() and int(owner) != os.getpid() and Path("/proc", owner).exists():
                continue
            if left.is_file():
                left.unlink(missing_ok=True)
            elif kind == "old" and not destination.exists():
                left.rename(destination)
            else:
                shutil.rmtree(left, ignore_errors=True)


def write_text(destination: Path, text: str) -> None:
    """Write ``text`` as UTF-8, all of it or nothing."""
    with publish_file(destination) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(destination: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline, all of it or nothing."""
    write_text(destination, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add ``line`` as UTF-8 with one write, on a line of its own even if a crash tore the last one.

    A lone surrogate, which UTF-8 has no bytes for, is written as an escape: in JSON it reads as the same one.
    """
    data = f"{line}\n".encode("utf-8", "backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Return the value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk, so that a rename cannot outrun the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
