"""Members of tar and zip archives in any order, for many threads at once; a damaged one is no other's trouble."""

import abc
import contextlib
import hashlib
import os
import posixpath
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks.archives import (
    DAMAGE,
    HEADER_BYTES,
    MAX_MEMBERS,
    MAX_TOTAL_BYTES,
    PADDING_BYTES,
    StrictTarInfo,
    archive_suffix,
    decompressed,
    zip_name,
)
from tasks.errors import NightlyError
from tasks.files import publish_file
from tasks.images import Status
from tasks.inputs import Entry, Fetched, Input, one_line, too_large
from tasks.progress import progress

_CHUNK_BYTES = 2**20
#: Where a member or, in a zip, its local header begins; the bytes it takes there; the file's bytes; their CRC; how
#: it is compressed. Packed, since tuples would take four times the memory.
_MEMBER = struct.Struct("<qqqIH")
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def open_archive(source: str, file: Path, scratch: Path) -> Input:
    """Open a tar, compressed or not, or a zip.

    Raises:
        NightlyError: it is damaged, truncated or over a limit.
    """
    suffix = archive_suffix(file)
    with _damage_of(source):
        if suffix == ".zip":
            return ZipMembers(source, file)
        return TarMembers(source, file if suffix == ".tar" else _unpacked(file, suffix, scratch))


@contextlib.contextmanager
def _damage_of(source: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the system: a disk that is full or fails is no damage to the archive
        raise NightlyError(f"{source} is damaged, truncated, or no tar or zip: {error}") from None


class Members(Input):
    """The files in an archive."""

    def __init__(self, source: str, file: Path) -> None:
        super().__init__(source, "archive")
        self._index: dict[str, bytes] = {}
        self._problems: dict[str, str] = {}
        self._file = file.open("rb")
        try:
            self._mtime = os.fstat(self._file.fileno()).st_mtime_ns
            self._read_index(self._file)
        except BaseException:
            self.close()
            raise

    def fetch(self, path: str, max_bytes: int) -> Fetched:
        if path not in self._index:
            return Fetched(None, 0, Status.VANISHED, "it is not in the archive any more")
        begin, packed, size, crc, method = _MEMBER.unpack(self._index[path])
        if path in self._problems:
            return Fetched(None, size, Status.UNREADABLE, self._problems[path])
        if max(size, packed) > max_bytes:
            return too_large(max(size, packed), max_bytes)
        try:
            data = self._read(begin, packed, size, crc, method)
        except (OSError, ValueError) as error:
            return Fetched(None, size, Status.UNREADABLE, one_line(error))
        except MemoryError:
            return Fetched(None, size, Status.TOO_LARGE, f"not enough memory for {size} bytes")
        if data is None:
            return Fetched(None, size, Status.TRUNCATED, "damaged in the archive")
        return Fetched(data, size)

    def close(self) -> None:
        self._file.close()

    @abc.abstractmethod
    def _read_index(self, file: BinaryIO) -> None: ...

    @abc.abstractmethod
    def _read(self, begin: int, packed: int, size: int, crc: int, method: int) -> bytes | None:
        """Return a member's bytes, None if they are damaged."""

    def _add(self, path: str, member: bytes, problem: str = "") -> None:
        if path in self._index:
            self.repeated += 1
            self._problems.pop(path, None)
        self._index[path] = member
        if problem:
            self._problems[path] = problem
        if len(self._index) > MAX_MEMBERS:
            raise NightlyError(f"{self.source} has more than {MAX_MEMBERS:,} members")

    def _entries(self) -> Iterator[Entry]:
        # The archive's own time for each: what is rewritten is found to have changed, whatever its members say.
        return ((path, _MEMBER.unpack(member)[2], self._mtime) for path, member in self._index.items())


class TarMembers(Members):
    """The files in an uncompressed tar; links to them are files, too."""

    def _read_index(self, file: BinaryIO) -> None:
        links = {}
        with tarfile.open(fileobj=_Headers(file), mode="r:", tarinfo=StrictTarInfo, encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                tar.fileobj.left = HEADER_BYTES
                tar.members.clear()  # tarfile would keep every header in memory
                if member.isdir():
                    continue
                path = _plain(member.name)
                regular = member.isreg() and not member.issparse()
                problem = "" if regular else "a link to no file of the archive, a device, a pipe or a sparse file"
                self._add(path, _MEMBER.pack(member.offset_data, member.size, member.size, 0, 0), problem)
                if member.islnk():
                    links[path] = _plain(member.linkname)
                elif member.issym():
                    links[path] = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
            _require_zeros(file, tar.offset)
        for path, target in links.items():
            if path in self._problems and target in self._index and target not in self._problems:
                self._index[path] = self._index[target]
                del self._problems[path]

    def _read(self, begin: int, packed: int, size: int, crc: int, method: int) -> bytes | None:
        data = os.pread(self._file.fileno(), size, begin)
        return data if len(data) == size else None


class ZipMembers(Members):
    """The files in a zip."""

    def _read_index(self, file: BinaryIO) -> None:
        with zipfile.ZipFile(file) as opened:
            for info in opened.infolist():
                if info.filename.endswith("/"):
                    continue
                problem = ""
                if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                    problem = "a link or a device in a zip"
                elif info.flag_bits & 0x1:
                    problem = "encrypted"
                elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    problem = f"compressed by method {info.compress_type}, neither 'stored' nor 'deflate'"
                facts = info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
                self._add(_plain(zip_name(info)), _MEMBER.pack(*facts), problem)

    def _read(self, begin: int, packed: int, size: int, crc: int, method: int) -> bytes | None:
        # Not by ZipFile: it would keep a kilobyte for each member, and threads would wait for each other.
        header = os.pread(self._file.fileno(), _LOCAL_HEADER.size, begin)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            return None
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        data = os.pread(self._file.fileno(), packed, begin + _LOCAL_HEADER.size + name_bytes + extra_bytes)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error:
                return None
        return data if len(data) == size and zlib.crc32(data) == crc else None


class _Headers:
    """A tar file of which only headers may be read: one may announce gigabytes that tarfile would put into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek = file.seek
        self.tell = file.tell
        self.left = HEADER_BYTES
        self._file = file

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError("headers of more bytes than any honest archive has")
        return self._file.read(size)


def _require_zeros(file: BinaryIO, begin: int) -> None:
    """Check that nothing stands behind a tar's end mark, since it would be left out unseen."""
    file.seek(begin)
    for _ in range(PADDING_BYTES // _CHUNK_BYTES):
        chunk = file.read(_CHUNK_BYTES)
        if chunk.count(0) < len(chunk):
            break
        if not chunk:
            return
    raise tarfile.ReadError("data after its end mark (two archives joined into one file?)")


def _unpacked(file: Path, suffix: str, scratch: Path) -> Path:
    """Return an uncompressed copy in ``scratch``, made unless it is there from an earlier call."""
    facts = file.stat()
    identity = f"{file.absolute()}\0{facts.st_size}\0{facts.st_mtime_ns}"
    plain = scratch / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}.tar"
    if plain.is_file():
        return plain
    with (
        decompressed(file, suffix) as stream,
        publish_file(plain) as partial,
        partial.open("wb") as copy,
        progress(f"Unpacking {file.name}", None, "bytes") as advance,
    ):
        while chunk := stream.read(_CHUNK_BYTES):
            copy.write(chunk)
            advance(len(chunk))
            if copy.tell() > MAX_TOTAL_BYTES:
                raise NightlyError(f"{file} unpacks to more than {MAX_TOTAL_BYTES:,} bytes")
    return plain


def _plain(name: str) -> str:
    """Return a member's name as unpacking would make it: below the top folder, without '.', '..' and '//'."""
    return posixpath.normpath(f"/{name}").lstrip("/") or "."
