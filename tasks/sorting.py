"""Classified images in a folder for each class, as links or copies."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.errors import NightlyError, describe
from tasks.images import Status
from tasks.inputs import Input

#: The folder of what the model is not sure of.
UNSURE = "_unsure"
_LONGEST_NAME = 255  # bytes, on all usual file systems


@dataclass
class SortCounts:
    """What became of the rows. ``unsure`` counts again what of ``placed`` and ``present`` is not accepted."""

    placed: int = 0
    present: int = 0
    unsure: int = 0
    failed: int = 0
    gone: int = 0


def sort_into(
    destination: Path,
    rows: Iterable[tuple[str, str | None, bool, str]],
    source: Input,
    mode: Literal["link", "copy"],
    max_bytes: int,
) -> SortCounts:
    """Put each classified image at ``<destination>/<label>/<its path>``, unsure ones below ``_unsure`` in there.

    The folders of the path are kept, so equal names in different folders stay apart. Each file is complete or absent;
    what is there already and equal is left, so a run that ended early can be repeated. What an earlier sorting with
    other labels put there stays.

    Args:
        rows: path, label, accepted and status; only those that are ``ok`` have a place.
        mode: ``link`` makes symbolic links with absolute targets and needs files of this machine.
        max_bytes: of a file that is copied. One that cannot be read any more counts as ``gone``.

    Raises:
        NightlyError: links into an archive or a remote store, another file in the way, or the disk is full.
    """
    counts = SortCounts()
    for path, label, accepted, status in rows:
        if status != Status.OK or label is None:
            counts.failed += 1
            continue
        place = destination / place_for(path, label, accepted=accepted)
        try:
            if mode == "link":
                fresh = _link(source, path, place)
            else:
                fetched = source.fetch(path, max_bytes)
                if fetched.data is None:
                    counts.gone += 1
                    continue
                fresh = _copy(fetched.data, place, destination)
        except (FileExistsError, NotADirectoryError):
            raise NightlyError(
                f"{str(place)!r} cannot be made: another file stands there or in place of its folder; "
                "give a directory that is empty or holds an earlier sorting of the same result"
            ) from None
        except OSError as error:
            error.filename = repr(str(place))  # which may hold a newline
            raise NightlyError(f"sorting into '{destination}' stopped: {describe(error)}") from error
        counts.placed += fresh
        counts.present += not fresh
        counts.unsure += not accepted
    return counts


def place_for(path: str, label: str, *, accepted: bool) -> Path:
    """Return where an image goes below the destination; never outside of it, whatever its path and label are."""
    folders = [] if accepted else [UNSURE]
    label = _safe(label.replace("/", "%2F"))
    # A class of that name would be taken for the unsure ones' folder.
    folders.append("%5Funsure" if label == UNSURE else label)
    return Path(*folders, *([_safe(part) for part in path.split("/") if part not in ("", ".")] or ["%"]))


def _safe(name: str) -> str:
    """Return a file's or folder's name as a file system takes it, two different ones different."""
    if name in ("", ".", ".."):
        return name.replace(".", "%2E") or "%"
    name = name.replace("\0", "%00")
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST_NAME:
        return name
    stem, suffix = os.path.splitext(encoded)
    end = b"~" + hashlib.sha256(encoded).hexdigest()[:16].encode() + suffix[-16:]
    return os.fsdecode(stem[: _LONGEST_NAME - len(end)] + end)


def _link(source: Input, path: str, place: Path) -> bool:
    """Link to a file; return False if that very link is there."""
    file = source.local(path)
    if file is None:
        raise NightlyError(
            f"--sort-into cannot link to files in '{source.source}', which is an archive or remote: use --copy"
        )
    target = os.path.abspath(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(target, place)
    except FileExistsError:
        if place.is_symlink() and os.readlink(place) == target:
            return False
        raise
    return True


def _copy(data: bytes, place: Path, destination: Path) -> bool:
    """Write a file aside and move it to its place; return False if an equal one is there.

    Not by ``publish_file``: it looks through the whole folder and waits for the disk, for each of a hundred thousand.
    """
    if os.path.lexists(place):
        if place.is_file() and not place.is_symlink() and place.read_bytes() == data:
            return False
        raise FileExistsError
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = destination / ".copying"
    try:
        aside.write_bytes(data)
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)
    return True
