"""Files of a remote store, by fsspec: ``s3://bucket/prefix`` and whatever else has ``://``."""

import datetime
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tasks.errors import NightlyError
from tasks.images import Status
from tasks.inputs import Entry, Fetched, Input, one_line, open_input, split_glob, too_large, translate
from tasks.store import open_remote

#: What is waited before the second and the third try of a request.
RETRY_SECONDS = (0.5, 2.0)
#: What stores call the time at which an object was written.
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")

Answer = TypeVar("Answer")


def open_address(address: str, scratch: Path) -> Input:
    """Open what stands at an address: a folder, one object or a pattern.

    Raises:
        NightlyError: its protocol is unknown, its package not installed, or nothing is there or may be seen.
    """
    from fsspec.implementations.local import LocalFileSystem

    files, root = open_remote(address)
    if isinstance(files, LocalFileSystem):
        found = open_input(root or "/", scratch)
        found.source = address
        return found
    facts, pattern = _look(address, files, root), None
    if facts is None and (split := split_glob(root, lambda _: False)):
        root, pattern = split
        facts = _look(address, files, root)
    if facts is None:
        raise NightlyError(f"there is nothing at '{address}': give a prefix with objects, or the address of one")
    return RemoteFiles(address, files, root, pattern, single=facts.get("type") == "file")


def _look(address: str, files: Any, path: str) -> dict | None:
    try:
        return _answer(address, lambda: files.info(path))
    except FileNotFoundError:
        return None


class RemoteFiles(Input):
    """Objects of a store.

    Args:
        files: fsspec's file system.
        pattern: what of ``root`` is meant; all of it if None.
        single: whether ``root`` is an object itself.
    """

    def __init__(self, source: str, files: Any, root: str, pattern: str | None, *, single: bool) -> None:
        super().__init__(source, "remote")
        self.named = single
        self._files = files
        self._start = root
        self._folder = root.rpartition("/")[0] if single else root
        self._pattern = pattern

    def fetch(self, path: str, max_bytes: int) -> Fetched:
        try:
            data, size = _persistently(lambda: self._read(f"{self._folder}/{path}", max_bytes))
        except FileNotFoundError:
            return Fetched(None, 0, Status.VANISHED, "the object is gone")
        except MemoryError:
            return Fetched(None, 0, Status.TOO_LARGE, f"not enough memory for up to {max_bytes} bytes")
        except Exception as error:
            # Each store raises what its network library does; one object may not stop the other hundred thousand.
            return Fetched(None, 0, Status.UNREADABLE, one_line(error))
        return Fetched(data, size) if size <= max_bytes else too_large(size, max_bytes)

    def _read(self, key: str, max_bytes: int) -> tuple[bytes, int]:
        """Return an object's bytes and their number, in one request unless it is empty or too large."""
        try:
            data = self._files.cat_file(key, start=0, end=max_bytes + 1)
        except (FileNotFoundError, MemoryError):
            raise
        except Exception as error:
            # HTTP calls any range of an empty object "not satisfiable" (416).
            if "range" not in str(error).lower() or self._files.size(key) != 0:
                raise
            return b"", 0
        if len(data) <= max_bytes:
            return data, len(data)
        return data, self._files.size(key) or len(data)

    def _entries(self) -> Iterator[Entry]:
        matches = re.compile(translate(self._pattern)).match if self._pattern else bool
        self._files.invalidate_cache()  # what is there now
        for key, facts in _answer(self.source, lambda: self._files.find(self._start, detail=True)).items():
            path = key.removeprefix(self._folder).removeprefix("/")
            if matches(path) and not path.endswith("/"):  # S3's consoles make empty objects for folders
                size = facts.get("size")
                yield path, -1 if size is None else size, _written(facts)
        self._files.invalidate_cache()  # a large store's list takes much memory


def _answer(address: str, request: Callable[[], Answer]) -> Answer:
    """Return what a store answers, an error of it as a line for the user."""
    try:
        return _persistently(request)
    except FileNotFoundError:
        raise
    except Exception as error:
        # See RemoteFiles.fetch.
        raise NightlyError(f"'{address}' cannot be listed: {one_line(error)}") from None


def _persistently(request: Callable[[], Answer]) -> Answer:
    """Return what a request gives, after some tries; what is not there or not allowed is asked for once.

    Each protocol has errors of its own, so all are waited out; that of the last try is the caller's.
    """
    for seconds in RETRY_SECONDS:
        try:
            return request()
        except (FileNotFoundError, PermissionError, MemoryError):
            raise
        except Exception:
            time.sleep(seconds)
    return request()


def _written(facts: dict[str, Any]) -> int:
    """Return when an object was written in ns since 1970, 0 if the store does not say."""
    value = next((facts[name] for name in _TIMES if facts.get(name) is not None), 0)
    if isinstance(value, datetime.datetime):
        value = value.timestamp()
    return int(value * 1e9) if isinstance(value, int | float) else 0
