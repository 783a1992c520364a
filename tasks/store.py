"""Where a prediction's files stand: a local folder or a prefix of an object store, each file complete or absent."""

import abc
import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from tasks.errors import NightlyError
from tasks.files import replace_directory, tidy_up

PLAN, FILES, PARTS = "plan/plan.json", "plan/files.parquet", "predictions.parquet"
#: What formats other than Parquet are written to.
TABLES = {"csv": "predictions.csv", "jsonl": "predictions.jsonl"}
REPORT = "report.html"
#: Written last: it is there exactly if a result is complete.
SUMMARY = "summary.json"
#: What a result consists of; anything else below an address is somebody's and stays.
OWN = (PLAN, FILES, PARTS, *TABLES.values(), REPORT, SUMMARY)


class Store(abc.ABC):
    """A folder of named files; names have ``/`` between their parts.

    Attributes:
        location: what ``open_store`` made it of, so that another process can open it, too.
    """

    location: str

    @abc.abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return a file's content, None if there is none."""

    @abc.abstractmethod
    def reading(self, name: str) -> BinaryIO:
        """Open a file to read anywhere in it; of one at an address, what is read is what is fetched."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Tell whether a file is there, whoever wrote it a moment ago."""

    @abc.abstractmethod
    def names(self, folder: str) -> set[str]:
        """Return the names of the complete files in ``folder``, without it."""

    @abc.abstractmethod
    def writing(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a file to write; it appears, whole, when the block ends well.

        Several may write the same file at once, in whatever processes on whatever machines: the last one's stays.
        """

    @abc.abstractmethod
    def clear(self) -> None:
        """Remove the result that is there, whole or not."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, all of it or nothing."""
        with self.writing(name) as file:
            file.write(data)


class LocalStore(Store):
    """A folder on this machine or on a file system that it shares with others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder.absolute())

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def reading(self, name: str) -> BinaryIO:
        return (self.folder / name).open("rb")

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def names(self, folder: str) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {name for name in os.listdir(self.folder / folder) if not name.startswith(".")}
        return set()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        # Not publish_file: it tells writers apart by process numbers, which mean nothing on another machine.
        destination = self.folder / name
        partial = destination.with_name(f".{destination.name}.partial-{uuid.uuid4().hex}")
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, destination: Path) -> None:
        """Become ``destination``, in place of what stands there, without what killed writers left."""
        for left in self.folder.rglob(".*.partial-*"):
            left.unlink(missing_ok=True)
        tidy_up(destination)
        replace_directory(self.folder, destination)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine out.

        Raises:
            NightlyError: one is at work here.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, not in it, since the folder goes elsewhere in the end.
        lock = FileLock(self.folder.with_name(f"{self.folder.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise NightlyError(f"another process is writing this result already ({self.folder})") from None
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


class RemoteStore(Store):
    """A prefix of an object store, by fsspec."""

    def __init__(self, address: str) -> None:
        self.location = address
        # Others write here, too: what a listing said a moment ago is no answer.
        self._files, self._root = open_remote(address, use_listings_cache=False)

    def read(self, name: str) -> bytes | None:
        try:
            return self._files.cat_file(self._at(name))
        except FileNotFoundError:
            return None

    def reading(self, name: str) -> BinaryIO:
        return self._files.open(self._at(name), "rb", cache_type="none")

    def exists(self, name: str) -> bool:
        return self._files.exists(self._at(name))

    def names(self, folder: str) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return {path.rsplit("/", 1)[-1] for path in self._files.ls(self._at(folder), detail=False)}
        return set()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        # Sent when it is whole: what closes an fsspec file in an error, or forgets it, sends what it has.
        # The suffix lets S3 know what browsers should take it for.
        with tempfile.NamedTemporaryFile(suffix=Path(name).suffix) as file:
            yield file
            file.flush()
            self._files.put_file(file.name, self._at(name))

    def clear(self) -> None:
        for name in OWN:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(self._at(name), recursive=True)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def open_remote(address: str, **options: bool) -> tuple:
    """Return fsspec's file system for an address such as ``s3://bucket/prefix``, and the path within it.

    Args:
        options: of the file system.

    Raises:
        NightlyError: its protocol is unknown, or the package that speaks it is not installed.
    """
    import fsspec

    try:
        files, root = fsspec.url_to_fs(address, **options)
    except (ValueError, ImportError) as error:
        extra = "; install resnet-nightly[s3]" if address.startswith(("s3:", "s3a:")) else ""
        raise NightlyError(f"'{address}' cannot be opened: {' '.join(str(error).split())}{extra}") from None
    return files, root.rstrip("/")


def is_remote(location: str) -> bool:
    """Tell whether a location is an fsspec address rather than a path."""
    return "://" in location


def open_store(location: str) -> Store:
    """Return the store at an fsspec address or a path."""
    return RemoteStore(location) if is_remote(location) else LocalStore(Path(location))
