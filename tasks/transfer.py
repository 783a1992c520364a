"""One file over HTTP from a server that may do anything: resumed, timed, verified."""

import errno
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import Field, ValidationError

from tasks.errors import NightlyError
from tasks.files import sha256_file, write_text
from tasks.params import Section
from tasks.progress import progress

#: An attempt that brings this much is no failure, however it ends.
PROGRESS_BYTES = 2**20
MAX_WAIT_SECONDS = 30.0
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
#: A proxy never helps to reach the machine one is on.
LOOPBACK = ("all://localhost", "all://127.0.0.1", "all://[::1]")


class TransferParams(Section):
    """How patient a download is with a mirror.

    Attributes:
        attempts: so many in a row that bring less than 1 MiB each end a mirror's turn.
        retry_wait_seconds: before the second attempt; each further wait is twice as long, up to 30 s.
        timeout_seconds: silence that ends an attempt.
        minimum_bytes_per_second: a mirror that stays below this is left for the next one; 0: never.
        minimum_rate_seconds: how long it may stay below.
    """

    attempts: int = Field(4, ge=1, le=100)
    retry_wait_seconds: float = Field(1.0, ge=0, le=60)
    timeout_seconds: float = Field(30.0, gt=0, le=3600)
    minimum_bytes_per_second: int = Field(100_000, ge=0)
    minimum_rate_seconds: float = Field(20.0, gt=0, le=3600)


@dataclass(frozen=True)
class Expected:
    """What is known of a file beforehand; None where nothing is."""

    size_bytes: int | None = None
    sha256: str | None = None
    md5: str | None = None
    max_bytes: int | None = None

    def verify(self, path: Path) -> str:
        """Return the SHA-256 of a file that is as expected.

        Raises:
            MirrorFailed: it has another size or checksum; with both.
        """
        size = path.stat().st_size
        if self.size_bytes not in (None, size):
            raise MirrorFailed(f"wrong size: {size:,} bytes came, {self.size_bytes:,} were expected")
        sha256 = sha256_file(path)
        if self.sha256 not in (None, sha256):
            raise MirrorFailed(f"wrong bytes: their SHA-256 is {sha256}, {self.sha256} was expected")
        if self.md5 is not None and self.md5 != (md5 := _md5_file(path)):
            raise MirrorFailed(f"wrong bytes: their MD5 is {md5}, {self.md5} was expected")
        return sha256


class MirrorFailed(Exception):
    """This mirror will not give the file; another may."""


class _TryAgain(Exception):
    """This attempt failed; the same mirror may do better at the next one."""


def fetch(url: str, folder: Path, expected: Expected, params: TransferParams) -> tuple[Path, str]:
    """Return a verified file's path in ``folder`` and its SHA-256; the caller moves it away.

    What came so far stays in ``folder`` between attempts and between runs. With a SHA-256 it is continued on
    any mirror, else only on the same address and under the validator that the server gave.

    Raises:
        MirrorFailed: the server refuses, is too slow, gives up too often, or sends other bytes than expected.
        NightlyError: the disk is full.
    """
    partial = _Partial(folder, url, expected)
    partial.trim(expected)
    most = partial.size
    misses = 0
    with _client(params) as client:
        while True:
            try:
                if partial.size != expected.size_bytes:
                    _continue(client, url, partial, expected, params)
                sha256 = _verify(partial, expected)
                partial.note.unlink(missing_ok=True)
                return partial.path, sha256
            except _TryAgain as problem:
                misses = 0 if partial.size >= most + PROGRESS_BYTES else misses + 1
                most = max(most, partial.size)
                partial.trim(expected)
                if misses >= params.attempts:
                    raise MirrorFailed(f"{problem} (given up at attempt {misses})") from None
                print(f"{shown(url)}: {problem}; trying again from byte {partial.size:,}", flush=True)
                time.sleep(min(MAX_WAIT_SECONDS, params.retry_wait_seconds * 2 ** max(0, misses - 1)))


def shown(url: str) -> str:
    """Return an address without user name, password and query, which may be secrets."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class _Origin(Section):
    """Where a partial file comes from, kept beside it; the address only as a digest, it may hold a secret."""

    address: str
    etag: str | None = None
    last_modified: str | None = None
    total_bytes: int | None = None

    @property
    def validator(self) -> str | None:
        """What an If-Range header may hold; a weak ETag promises nothing about bytes."""
        return self.last_modified if self.etag is None or self.etag.startswith("W/") else self.etag


class _Partial:
    """The bytes that came so far, and whether they may be continued."""

    def __init__(self, folder: Path, url: str, expected: Expected) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.address = hashlib.sha256(url.encode()).hexdigest()
        name = f"sha256-{expected.sha256[:16]}" if expected.sha256 else f"url-{self.address[:16]}"
        self.path = folder / f"{name}.partial"
        self.note = folder / f"{name}.json"
        self.size = self.path.stat().st_size if self.path.is_file() else 0
        self.in_one_piece = False
        self.origin = self._read_origin()
        if self.origin is not None and self.origin.address != self.address:
            self.origin = None

    def _read_origin(self) -> _Origin | None:
        try:
            return _Origin.model_validate_json(self.note.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.size = 0
        self.origin = None
        self.in_one_piece = False

    def trim(self, expected: Expected) -> None:
        """Discard bytes that cannot be continued because nothing would show that the pieces belong together."""
        same_address_proof = self.origin is not None and (expected.md5 or self.origin.validator)
        too_long = expected.size_bytes is not None and self.size > expected.size_bytes
        if too_long or not (expected.sha256 or same_address_proof):
            self.discard()

    def begin(self, origin: _Origin) -> None:
        """Make ready for a whole file from its first byte."""
        self.discard()
        self.in_one_piece = True
        self._describe(origin)

    def go_on(self, origin: _Origin) -> None:
        """Make ready for the bytes that follow those here."""
        self.in_one_piece = False
        self._describe(origin)

    def _describe(self, origin: _Origin) -> None:
        self.origin = origin
        write_text(self.note, origin.model_dump_json())


def _client(params: TransferParams) -> httpx.Client:
    try:
        return httpx.Client(
            follow_redirects=True,
            timeout=params.timeout_seconds,
            # An archive is wanted byte for byte, also from servers that compress on the way.
            headers={"Accept-Encoding": "identity", "User-Agent": "resnet-nightly"},
            mounts=dict.fromkeys(LOOPBACK),
        )
    except (ValueError, ImportError) as error:
        raise NightlyError(f"the proxy named in the environment cannot be used: {error}") from None


def _continue(client: httpx.Client, url: str, partial: _Partial, expected: Expected, params: TransferParams) -> None:
    """Ask for what is missing and append it."""
    headers = {}
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
        if partial.origin and partial.origin.validator:
            headers["If-Range"] = partial.origin.validator
    try:
        with client.stream("GET", url, headers=headers) as response:
            if response.status_code == 416 and partial.size and _range(response)[1] == partial.size:
                return  # everything was here already
            total = _accept(response, partial, expected)
            _receive(response, shown(url), partial, total, expected, params)
    except httpx.TransportError as error:
        raise _TryAgain(_describe(error)) from None
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise MirrorFailed(_describe(error)) from None
    if total is not None and partial.size != total:
        raise _TryAgain(f"the connection ended after {partial.size:,} of {total:,} bytes")


def _accept(response: httpx.Response, partial: _Partial, expected: Expected) -> int | None:
    """Check the response's head and make ``partial`` ready for its body; return the file's size if it is known."""
    status = response.status_code
    if status in TRANSIENT:
        raise _TryAgain(f"it answers {status} {response.reason_phrase}".rstrip())
    start, total = _range(response)
    if status == 206:
        known = partial.origin.total_bytes if partial.origin else None
        same_file = not (partial.origin and partial.origin.etag) or (
            response.headers.get("etag") in (None, partial.origin.etag)
        )
        if not partial.size or start != partial.size or known not in (None, total) or not same_file:
            partial.discard()
            raise _TryAgain("it continues another file or at another byte than asked")
    elif status == 416 and partial.size:
        partial.discard()
        raise _TryAgain("it has fewer bytes than are here already")
    elif status == 200:
        total = int(response.headers["content-length"]) if "content-length" in response.headers else None
    else:
        raise MirrorFailed(f"it answers {status} {response.reason_phrase}".rstrip())
    if total is not None and expected.size_bytes not in (None, total):
        raise MirrorFailed(f"it offers {total:,} bytes, {expected.size_bytes:,} were expected")
    if total is not None and expected.max_bytes is not None and total > expected.max_bytes:
        raise MirrorFailed(f"it offers {total:,} bytes, at most {expected.max_bytes:,} are allowed")
    origin = _Origin(
        address=partial.address,
        etag=response.headers.get("etag"),
        last_modified=response.headers.get("last-modified"),
        total_bytes=total,
    )
    partial.go_on(origin) if status == 206 else partial.begin(origin)
    return expected.size_bytes if total is None else total


def _range(response: httpx.Response) -> tuple[int | None, int | None]:
    """Return first byte and file size from a Content-Range header, ``bytes 5-9/10`` or ``bytes */10``."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("content-range", "").strip())
    start, total = match.groups() if match else (None, None)
    return int(start) if start else None, int(total) if total and total != "*" else None


def _receive(
    response: httpx.Response,
    source: str,
    partial: _Partial,
    total: int | None,
    expected: Expected,
    params: TransferParams,
) -> None:
    """Append the body as it comes, undecoded; stop when it is too slow or too long."""
    limit = expected.size_bytes or total or expected.max_bytes
    missing = None if total is None else total - partial.size
    window_start, window_bytes = time.monotonic(), 0
    try:
        with partial.path.open("ab") as file, progress(source, missing, "bytes") as advance:
            for chunk in response.iter_raw():
                file.write(chunk)
                partial.size += len(chunk)
                advance(len(chunk))
                if limit is not None and partial.size > limit:
                    partial.discard()
                    raise MirrorFailed(f"it sends more than {limit:,} bytes")
                window_bytes += len(chunk)
                seconds = time.monotonic() - window_start
                if seconds >= params.minimum_rate_seconds:
                    if window_bytes < params.minimum_bytes_per_second * seconds:
                        raise MirrorFailed(
                            f"it is too slow: {window_bytes / seconds:,.0f} bytes/s, download.minimum_bytes_per_second "
                            f"is {params.minimum_bytes_per_second:,}"
                        )
                    window_start, window_bytes = time.monotonic(), 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = partial.path.stat().st_size
        raise NightlyError(
            f"the disk is full: {kept:,} bytes are kept in {partial.path} and will be continued; "
            f"free some space and run the same command again"
        ) from None


def _verify(partial: _Partial, expected: Expected) -> str:
    """Return the SHA-256 of a complete file; a wrong one is deleted."""
    try:
        return expected.verify(partial.path)
    except MirrorFailed as problem:
        blameless = not partial.in_one_piece  # the wrong bytes may be those of an earlier response
        partial.discard()
        if blameless:
            raise _TryAgain(f"{problem} (after joining pieces)") from None
        raise


def _describe(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _md5_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
