"""What a batch prediction classifies: a directory, an image, a glob, a list of paths, an archive or a remote store.

Each gives the same two things: the names of its files in natural order, and the bytes of one of them.
"""

import abc
import glob
import math
import os
import re
import stat
import sys
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from natsort import natsort_keygen

from tasks.archives import MAGIC
from tasks.errors import NightlyError
from tasks.images import DecodePolicy, Status, decode
from tasks.sources import is_side_file
from tasks.store import is_remote

KINDS = (
    "a directory, an image, a pattern such as 'photos/**/*.jpg', a list of paths (.txt, .lst, .list), a tar or zip "
    "archive, - for standard input, or an address such as s3://bucket/prefix"
)
LIST_SUFFIXES = (".txt", ".lst", ".list")
#: Names that promise an archive: if it is none, nor an image, it is a damaged one or of a kind that is not read.
ARCHIVE_SUFFIXES = (".tar", ".zip", ".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
#: Path, size in bytes (-1 unknown) and time in ns (0 unknown).
Entry = tuple[str, int, int]


@dataclass(frozen=True)
class Listing:
    """The files of an input.

    Args:
        paths: in natural order, each once; bytes that are no UTF-8 as surrogate escapes.
        sizes: int64 (N,), bytes; -1 where unknown.
        mtimes: int64 (N,), ns since 1970; 0 where unknown.
        side_files: hidden files and usual companions of images, left out.
        excluded: left out by ``include`` and ``exclude``.
        repeated: named more than once in a list or an archive; of an archive's, the last one counts, as in unpacking.
    """

    paths: list[str]
    sizes: np.ndarray
    mtimes: np.ndarray
    side_files: int = 0
    excluded: int = 0
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """One file's bytes, or why there are none: ``status`` is None exactly when ``data`` is there."""

    data: bytes | None
    size: int
    status: Status | None = None
    reason: str = ""


class Input(abc.ABC):
    """A source of files. ``fetch`` and ``local`` take any of ``find``'s paths, also if another process called it."""

    #: Whether each path was named by someone, so that even a hidden file is meant.
    named = False
    repeated = 0

    def __init__(self, source: str, kind: str) -> None:
        self.source = source
        self.kind = kind

    def find(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Listing:
        """List the files; ``include`` and ``exclude`` are patterns as in a .gitignore, without its ``!``.

        Raises:
            NightlyError: a pattern is none, or a remote store gives no list.
        """
        included, excluded_by = matcher(include), matcher(exclude)
        paths, sizes, mtimes = [], array("q"), array("q")
        side_files = excluded = 0
        for path, size, mtime in self._entries():
            if not self.named and is_side_file(path):
                side_files += 1
            elif (include and not included(path)) or excluded_by(path):
                excluded += 1
            else:
                paths.append(path)
                sizes.append(size)
                mtimes.append(mtime)
        order = natural_order(paths)
        kept = np.array(order[:1] + [new for old, new in pairwise(order) if paths[old] != paths[new]], int)
        return Listing(
            [paths[index] for index in kept],
            np.array(sizes, np.int64)[kept],
            np.array(mtimes, np.int64)[kept],
            side_files,
            excluded,
            self.repeated + len(paths) - len(kept),
        )

    @abc.abstractmethod
    def fetch(self, path: str, max_bytes: int) -> Fetched:
        """Return the bytes of one file; never raises, never waits for a pipe or a device; for any thread."""

    def local(self, path: str) -> Path | None:
        """Return where that file stands on this machine, None if it is in an archive or remote."""
        return None

    def close(self) -> None:
        """Release what is open; no file can be fetched any more."""
        return None

    @abc.abstractmethod
    def _entries(self) -> Iterator[Entry]: ...


def open_input(source: str, scratch: Path, names: Callable[[], Iterable[bytes]] | None = None) -> Input:
    """Open what a user named.

    Args:
        scratch: a directory on a disk with room: random access to a compressed tar needs it unpacked. What is there
            from an earlier call is used again; the caller removes it.
        names: standard input's bytes in pieces, such as lines; ``sys.stdin.buffer`` by default.

    Raises:
        NightlyError: nothing is there, or an archive is damaged or an address not understood.
    """
    if source == "-":
        return LocalFiles(source, "stdin", Path.cwd(), partial(_named, names or (lambda: sys.stdin.buffer)))
    if is_remote(source):
        from tasks.objects import open_address

        return open_address(source, scratch)
    path = Path(source)
    if os.path.isdir(source):
        return LocalFiles(source, "directory", path, _walk)
    if os.path.isfile(source):
        if path.suffix.lower() in LIST_SUFFIXES:
            return LocalFiles(source, "list", path.parent, partial(_named, lambda: [path.read_bytes()]))
        if _is_archive(path):
            from tasks.members import open_archive

            return open_archive(source, path, scratch)
    if os.path.exists(source):
        return LocalFiles(source, "file", path.parent, partial(_named, lambda: [os.fsencode(path.name), b"\0"]))
    if (split := split_glob(source, os.path.isdir)) and os.path.isdir(split[0]):
        return LocalFiles(source, "glob", Path(split[0]), partial(_walk, pattern=split[1]))
    raise NightlyError(f"there is nothing at '{source}': give {KINDS}")


def read_file(path: str | os.PathLike[str], max_bytes: int) -> Fetched:
    """Read a regular file; never raises, and never waits for a pipe or a device."""
    size = 0
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                return Fetched(None, 0, Status.UNREADABLE, "not a regular file")
            size = facts.st_size
            if size > max_bytes:
                return too_large(size, max_bytes)
            with open(descriptor, "rb", closefd=False) as file:
                return Fetched(file.read(size) or b"", size)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return Fetched(None, 0, Status.VANISHED, "the file is gone")
    except (OSError, ValueError) as error:  # ValueError: a zero byte or a lone surrogate in the name
        return Fetched(None, size, Status.UNREADABLE, one_line(error))
    except MemoryError:
        return Fetched(None, size, Status.TOO_LARGE, f"not enough memory for {size} bytes")


def too_large(size: int, max_bytes: int) -> Fetched:
    """Return the outcome for a file of more than the allowed bytes."""
    return Fetched(None, size, Status.TOO_LARGE, f"{size} bytes, allowed: {max_bytes}")


def one_line(error: BaseException) -> str:
    """Return what an error says as one line of ASCII."""
    text = str(getattr(error, "strerror", None) or error or repr(error))
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())[:200]


def natural_order(paths: Sequence[str]) -> list[int]:
    """Return the positions of ``paths`` in natsort's order, ties in the order of their characters."""
    split = natsort_keygen()

    def key(index: int) -> str:
        # natsort's tuples, in a quarter of their memory: in a string, a longer number is a larger one once the
        # number of digits stands before them, and no name has a character below the zero byte.
        parts = ((part, str(part)) for part in split(paths[index]))
        return "".join(text if part is text else f"\0{chr(len(text))}{text}" for part, text in parts)

    order = sorted(range(len(paths)), key=paths.__getitem__)
    order.sort(key=key)
    return order


def matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a path, or a folder it is in, matches one of the patterns."""
    expressions = []
    for pattern in patterns:
        # Without a slash before its end, a pattern holds at any depth.
        anchored = pattern.strip("/") if "/" in pattern.rstrip("/") else f"**/{pattern.rstrip('/')}"
        below = translate(f"{anchored}/**", pattern)
        expressions.append(below if pattern.endswith("/") else f"{translate(anchored, pattern)}|{below}")
    found = [re.compile(expression).match for expression in expressions]
    return lambda path: any(match(path.lstrip("/")) for match in found)


def translate(pattern: str, written: str | None = None) -> str:
    """Return the regular expression for a pattern of whole paths, in which ``**`` stands for any number of folders."""
    from fsspec.utils import glob_translate  # not above: it takes a third of a second

    try:
        return glob_translate(pattern)
    except ValueError as error:
        raise NightlyError(f"pattern '{written or pattern}' is not understood: {error}") from None


def split_glob(source: str, is_folder: Callable[[str], bool]) -> tuple[str, str] | None:
    """Split a pattern after its longest folder without a wildcard; an existing folder's name has none."""
    parts = source.split("/")
    for count, part in enumerate(parts):
        if glob.has_magic(part) and not is_folder("/".join(parts[: count + 1])):
            return "/".join(parts[:count]) or ("/" if count else "."), "/".join(parts[count:])
    return None


class LocalFiles(Input):
    """Files that stand on this machine, by themselves."""

    def __init__(self, source: str, kind: str, base: Path, list_files: Callable[[Path], Iterator[Entry]]) -> None:
        super().__init__(source, kind)
        self.named = kind in ("file", "list", "stdin")
        self._base = base
        self._list = list_files

    def fetch(self, path: str, max_bytes: int) -> Fetched:
        return read_file(os.path.join(self._base, path), max_bytes)

    def local(self, path: str) -> Path:
        return self._base / path

    def _entries(self) -> Iterator[Entry]:
        return self._list(self._base)


def _walk(base: Path, pattern: str | None = None) -> Iterator[Entry]:
    """Yield all files below ``base``; links to files are files, links to folders nothing, so that no loop is entered.

    A folder that cannot be listed is yielded itself, so that it is not lost in silence.
    """
    matches = re.compile(translate(pattern)).match if pattern else bool
    depth = pattern.count("/") if pattern and "**" not in pattern else math.inf
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(os.path.join(base, folder)) as entries:
                for entry in entries:
                    path = folder + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if path.count("/") < depth:
                            waiting.append(path + "/")
                    elif matches(path) and not _leads_to_folder(entry):
                        yield path, *_facts(entry.stat)
        except OSError:
            if not folder:
                raise
            yield folder.rstrip("/"), -1, 0


def _leads_to_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # it leads to itself
        return False


def _named(read: Callable[[], Iterable[bytes]], base: Path) -> Iterator[Entry]:
    """Yield every path of a list: one a line or, if there is a zero byte, all that stands between zero bytes."""
    text = b"".join(read()).removeprefix(b"\xef\xbb\xbf")
    lines = b"\0" not in text
    for name in re.finditer(rb"[^\r\n]+(?:\r+[^\r\n]+)*" if lines else rb"[^\0]+", text):
        if not lines or name[0].strip():
            path = str(PurePosixPath(os.fsdecode(name[0])))  # without './' and '//'
            yield path, *_facts(partial(os.stat, os.path.join(base, path)))


def _facts(look: Callable[[], os.stat_result]) -> tuple[int, int]:
    """Return size and time; unknown where fetching the file will tell why."""
    try:
        facts = look()
    except (OSError, ValueError):
        return -1, 0
    return facts.st_size, facts.st_mtime_ns


def _is_archive(file: Path) -> bool:
    with file.open("rb") as opened:
        head = opened.read(4096)
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        return True
    except tarfile.HeaderError:
        promised = file.suffix.lower() in ARCHIVE_SUFFIXES
        no_image = promised and decode(head, DecodePolicy()).status in (Status.EMPTY, Status.NOT_AN_IMAGE)
        return no_image or head.startswith(tuple(MAGIC))
