"""Tar and zip archives: read member by member and distrusted, written the same way every time."""

import bz2
import gzip
import io
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tasks.errors import NightlyError

MAX_MEMBER_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 200 * 10**9
MAX_MEMBERS = 5_000_000

#: First bytes of a file and the suffix they deserve; everything else may be a plain tar.
MAGIC = {
    b"PK\x03\x04": ".zip",
    b"PK\x05\x06": ".zip",
    b"\x1f\x8b": ".tar.gz",
    b"BZh": ".tar.bz2",
    b"\xfd7zXZ\x00": ".tar.xz",
}
#: How much tarfile may read to understand one member's headers; a long name needs a few hundred bytes,
#: but a hostile one may announce gigabytes that tarfile would read into memory.
HEADER_BYTES = 4 * 2**20
#: Zeros after the last member; tapes were padded to whole records.
PADDING_BYTES = 64 * 2**20
BLOCK_BYTES = 256 * tarfile.BLOCKSIZE

#: What the standard library raises on damaged archives. RecursionError: a chain of long-name headers.
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
    RecursionError,
    OverflowError,
)


def read_members(
    archive: Path,
    *,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    max_total_bytes: int = MAX_TOTAL_BYTES,
    max_members: int = MAX_MEMBERS,
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and bytes of each regular file in a tar (any compression) or zip, in the archive's order.

    Names are relative posix paths without ``.`` and ``..``. Directories and macOS resource forks are left
    out. One member is in memory at a time, besides the index of names. An archive is known to be whole only
    once the last member was taken.

    Raises:
        NightlyError: the archive is damaged, truncated or over a limit, or a member is a link, a device, encrypted,
            twice there, or named so that it could leave a folder; with the archive and the member.
    """
    inspector = Inspector(archive, max_member_bytes, max_total_bytes, max_members)
    suffix = archive_suffix(archive)
    members = _zip_members(archive, inspector) if suffix == ".zip" else _tar_members(archive, suffix, inspector)
    try:
        yield from members
    except DAMAGE as error:
        after = f"after member {inspector.last!r}" if inspector.last else "at its start"
        raise NightlyError(f"{archive} is damaged, truncated, or no tar or zip, {after}: {error}") from None


def archive_suffix(archive: Path) -> str:
    """Return the suffix that an archive's first bytes call for, such as ``.tar.gz``; the name is not looked at."""
    with archive.open("rb") as file:
        head = file.read(8)
    return next((suffix for magic, suffix in MAGIC.items() if head.startswith(magic)), ".tar")


def write_tar(destination: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write an uncompressed tar; the same members give the same bytes, on any day and as any user."""
    with tarfile.open(destination, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # its time, user and group are zero
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            tar.members.clear()  # tarfile would keep every header in memory


def normal_name(name: str) -> str:
    """Return ``name`` as a relative posix path; empty for the top folder itself.

    Raises:
        ValueError: the name could lead out of a folder on some system, or is not UTF-8; with the reason.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8") from None
    if "\\" in name:
        raise ValueError("its name holds a backslash; folders are separated by /")
    if "\0" in name:
        raise ValueError("its name holds a zero byte")
    if name.startswith("/"):
        raise ValueError("its name is absolute")
    if re.match(r"[A-Za-z]:", name):
        raise ValueError("its name begins with a drive letter")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("its name leads out of the archive by '..'")
    return "/".join(parts)


@dataclass
class Inspector:
    """What is checked for each member, whether it is read or written; ``archive`` is named in errors."""

    archive: Path
    max_member_bytes: int = MAX_MEMBER_BYTES
    max_total_bytes: int = MAX_TOTAL_BYTES
    max_members: int = MAX_MEMBERS
    last: str = ""
    members: int = 0
    total_bytes: int = 0
    seen: set[str] = field(default_factory=set)

    def refuse(self, name: str, reason: str) -> NightlyError:
        return NightlyError(f"{self.archive}: member {name!r} is refused: {reason}")

    def admit(self, raw_name: str, size: int, *, is_folder: bool) -> str | None:
        """Return the member's normal name, or None if it is left out."""
        self.members += 1
        if self.members > self.max_members:
            raise self.refuse(raw_name, f"the archive has more than {self.max_members:,} members")
        try:
            name = normal_name(raw_name)
        except ValueError as error:
            raise self.refuse(raw_name, str(error)) from None
        if is_folder:
            return None
        if not name:
            raise self.refuse(raw_name, "it has no name")
        if size < 0 or size > self.max_member_bytes:
            raise self.refuse(name, f"it has {size:,} bytes, at most {self.max_member_bytes:,} are allowed")
        self.total_bytes += size
        if self.total_bytes > self.max_total_bytes:
            raise self.refuse(name, f"the archive unpacks to more than {self.max_total_bytes:,} bytes")
        if name in self.seen:
            raise self.refuse(name, "the archive holds this name twice")
        self.seen.add(name)
        parts = name.split("/")
        if "__MACOSX" in parts or parts[-1].startswith("._"):
            return None
        return name


def _zip_members(archive: Path, inspector: Inspector) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            raw_name = zip_name(info)
            name = inspector.admit(raw_name, info.file_size, is_folder=raw_name.endswith("/"))
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise inspector.refuse(raw_name, "it is a link or a device; only files are allowed")
            if info.flag_bits & 0x1:
                raise inspector.refuse(raw_name, "it is encrypted; pack the files without a password")
            if name is None:
                continue
            # bzip2 and LZMA inside a zip unpack without a bound on memory; images gain nothing from them.
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise inspector.refuse(raw_name, "its compression is neither 'stored' nor 'deflate'")
            with opened.open(info) as file:
                data = file.read(info.file_size)  # read() without a size would unpack what the header hides
            if len(data) != info.file_size:
                raise EOFError(f"{info.file_size:,} bytes are announced for {name!r}, {len(data):,} came")
            inspector.last = name
            yield name, data


def zip_name(info: zipfile.ZipInfo) -> str:
    """Return the name as UTF-8, with surrogate escapes: several systems write it so without the flag that says so."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # it came from an extra field for names in Unicode
        return info.filename


class StrictTarInfo(tarfile.TarInfo):
    """A header whose damage is an error: tarfile itself takes a bad header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # a block of zeros is how an archive ends
            raise tarfile.ReadError("it ends without an end mark" if not buf else str(error)) from None
        if info.size < 0:
            raise tarfile.ReadError("a negative size")
        return info


class _Metered:
    """A stream that fails beyond an allowance, so that no announced size makes tarfile fill the memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.left = 0

    def allow(self, count: int) -> None:
        self.left = count + BLOCK_BYTES

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError("headers or padding of more bytes than any honest archive has")
        return data


def _tar_members(archive: Path, suffix: str, inspector: Inspector) -> Iterator[tuple[str, bytes]]:
    with decompressed(archive, suffix) as stream:
        metered = _Metered(stream)
        metered.allow(HEADER_BYTES)
        with tarfile.open(
            fileobj=metered, mode="r|", bufsize=BLOCK_BYTES, tarinfo=StrictTarInfo, encoding="utf-8"
        ) as tar:
            while (member := tar.next()) is not None:
                metered.allow(HEADER_BYTES)
                tar.members.clear()  # tarfile would keep every header in memory
                name = inspector.admit(member.name, member.size, is_folder=member.isdir())
                if member.issym() or member.islnk():
                    raise inspector.refuse(member.name, "it is a link; pack the file that it leads to")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise inspector.refuse(member.name, "it is a device, a pipe or a sparse file")
                metered.allow(member.size + HEADER_BYTES)
                data = tar.extractfile(member).read()
                if name is not None:
                    inspector.last = name
                    yield name, data
            # To the very end: the checksum of a compressed stream stands there.
            metered.allow(PADDING_BYTES)
            while padding := tar.fileobj.read(BLOCK_BYTES):
                if any(padding):
                    raise tarfile.ReadError("data after its end mark (two archives joined into one file?)")


def decompressed(archive: Path, suffix: str) -> AbstractContextManager[BinaryIO]:
    openers = {".tar.gz": gzip.open, ".tar.bz2": bz2.open, ".tar.xz": lzma.open}
    return openers.get(suffix, open)(archive, "rb")
