"""The source brought into ``data/raw``, verified: embedded digits, CIFAR-10, or any folder or archive of images."""

import argparse
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from filelock import FileLock, Timeout
from natsort import natsort_keygen
from pydantic import Field, field_validator, model_validator

from tasks import archives, transfer
from tasks.errors import NightlyError, describe, run_main
from tasks.files import publish_directory, write_json
from tasks.params import read_section
from tasks.progress import progress
from tasks.sources import CIFAR_RECORD_BYTES, is_side_file, read_labels
from tasks.transfer import Expected, MirrorFailed, TransferParams, shown

CIFAR10_BYTES = 170_052_171
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_CLASSES = 10
CIFAR10_BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")

#: Outside the output, which DVC deletes before the stage runs.
PARTIAL_FOLDER = Path(".nightly/downloads")
COPY_BYTES = 2**22


class DownloadParams(TransferParams):
    """Where the images come from, and what is known of them beforehand.

    Attributes:
        source: ``digits`` is embedded and takes no address; ``cifar10`` is the binary archive; ``folder`` is a
            directory, tar or zip of ``<class>/<image>`` or ``train|test/<class>/<image>``.
        urls: addresses of the same archive, tried in order, each http(s)://, file:// or a local path.
        path: one local file or directory, in place of ``urls``.
        sha256: of the archive, 64 hex digits. If ``cifar10`` comes with none of ``sha256``, ``md5`` and ``size_bytes``,
            those of the original archive hold.
        md5: of the archive, 32 hex digits.
        size_bytes: of the archive.
        max_member_bytes: that one file of the archive may unpack to.
        max_total_bytes: that all its files together may unpack to, and that the archive itself may have.
        max_members: files and folders that it may hold.
    """

    source: Literal["digits", "cifar10", "folder"] = "digits"
    urls: tuple[str, ...] = ()
    path: str | None = Field(None, min_length=1)
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    md5: str | None = Field(None, pattern="^[0-9a-fA-F]{32}$")
    size_bytes: int | None = Field(None, gt=0)
    max_member_bytes: int = Field(archives.MAX_MEMBER_BYTES, gt=0)
    max_total_bytes: int = Field(archives.MAX_TOTAL_BYTES, gt=0)
    max_members: int = Field(archives.MAX_MEMBERS, gt=0)

    @field_validator("urls", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, urls: object) -> object:
        return (urls,) if isinstance(urls, str) else urls

    @field_validator("urls")
    @classmethod
    def _known_schemes(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            scheme, separator, _ = url.partition("://")
            if not url or (separator and scheme not in ("http", "https", "file")):
                raise ValueError(f"{shown(url)!r} must begin with http://, https:// or file://, or be a local path")
            if scheme in ("http", "https") and not urlsplit(url).hostname:
                raise ValueError(f"{shown(url)!r} names no host")
            if scheme == "file" and urlsplit(url).netloc not in ("", "localhost"):
                raise ValueError(f"{url!r} must name this machine's file, as in file:///data/images.tar")
        return urls

    @model_validator(mode="after")
    def _address_fits_source(self) -> "DownloadParams":
        if self.urls and self.path:
            raise ValueError("give 'urls' or 'path', not both")
        if self.source == "digits":
            given = [name for name in ("urls", "path", "sha256", "md5", "size_bytes") if getattr(self, name)]
            if given:
                raise ValueError(f"source 'digits' is embedded and takes no {given[0]!r}")
        elif not self.urls and not self.path:
            raise ValueError(f"source {self.source!r} needs 'urls' or 'path'")
        return self

    @property
    def mirrors(self) -> tuple[str, ...]:
        """Addresses in the order in which they are tried."""
        return self.urls or (self.path,)

    @property
    def expected(self) -> Expected:
        """What the file must be, with the original's facts where CIFAR-10 comes without any."""
        size, sha256, md5 = self.size_bytes, self.sha256, self.md5
        if self.source == "cifar10" and not (size or sha256 or md5):
            size, sha256 = CIFAR10_BYTES, CIFAR10_SHA256
        return Expected(size, sha256 and sha256.lower(), md5 and md5.lower(), self.max_total_bytes)

    @property
    def limits(self) -> dict[str, int]:
        """The archive limits as ``read_members`` takes them."""
        names = ("max_member_bytes", "max_total_bytes", "max_members")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class DownloadSummary:
    """What stands in ``source.json``, where it came from, and what of a folder was left out, by reason."""

    source: str
    format: str
    file: str
    bytes: int
    sha256: str
    origin: str
    left_out: dict[str, list[str]] = field(default_factory=dict)


def download(out: Path, params: DownloadParams, partial: Path = PARTIAL_FOLDER) -> DownloadSummary:
    """Bring the source into ``out``: one data file and ``source.json``.

    Args:
        partial: a folder outside ``out`` where interrupted downloads wait to be continued.

    Raises:
        NightlyError: no mirror gave the expected bytes, or they are not what the source promises.
    """
    left_out: dict[str, list[str]] = {}
    with publish_directory(out) as folder:
        if params.source == "digits":
            origin = "embedded in scikit-learn"
            file = folder / "digits.tar"
            archives.write_tar(file, digit_images())
            sha256 = Expected().verify(file)
        else:
            file = folder / "download"
            origin, sha256, left_out = bring(params, file, partial)
            stem = "cifar-10-binary" if params.source == "cifar10" else "images"
            file = file.rename(folder / (stem + archives.archive_suffix(file)))
        kind = "cifar10-binary" if params.source == "cifar10" else "folder"
        facts = {
            "source": params.source,
            "format": kind,
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": sha256,
        }
        write_json(folder / "source.json", facts)
    return DownloadSummary(**facts, origin=origin, left_out=left_out)


def digit_images() -> Iterator[tuple[str, bytes]]:
    """Yield scikit-learn's handwritten digits as 8×8 gray PNGs, ``<digit>/<nnnn>.png``, digit by digit."""
    import cv2
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for index in np.argsort(digits.target, kind="stable"):
        _, png = cv2.imencode(".png", pixels[index])
        yield f"{digits.target[index]}/{index:04d}.png", png.tobytes()


def bring(params: DownloadParams, file: Path, partial: Path) -> tuple[str, str, dict[str, list[str]]]:
    """Put the first mirror's archive that holds what it should at ``file``.

    Returns:
        the mirror, the archive's SHA-256, and what of a folder was left out, by reason.

    Raises:
        NightlyError: no mirror gave it; with each one's reason.
    """
    failures = []
    for mirror in params.mirrors:
        if failures:
            print(f"{failures[-1]}; trying the next address", flush=True)
        left_out: dict[str, list[str]] = {}
        try:
            if mirror.startswith(("http://", "https://")):
                sha256 = _take_remote(mirror, file, partial, params)
            else:
                sha256, left_out = _take_local(local_path(mirror), file, params)
        except MirrorFailed as failure:
            failures.append(f"{shown(mirror)}: {failure}")
        else:
            return shown(mirror), sha256, left_out
    raise NightlyError("the download failed: " + "; ".join(failures))


def _take_remote(url: str, file: Path, partial: Path, params: DownloadParams) -> str:
    expected = params.expected
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(partial / "lock", timeout=0):
            fetched, sha256 = transfer.fetch(url, partial, expected, params)
            shutil.move(fetched, file)
    except Timeout:
        raise NightlyError(f"another download is at work in {partial}: wait until it has ended") from None
    _check_content(file, params)
    if not (expected.sha256 or expected.md5):
        size = file.stat().st_size
        print(
            f"warning: nothing was known to verify {shown(url)} by; if these bytes are the right ones, pin them "
            f"under 'download:' with 'sha256: {sha256}' and 'size_bytes: {size}'",
            flush=True,
        )
    return sha256


def _take_local(path: Path, file: Path, params: DownloadParams) -> tuple[str, dict[str, list[str]]]:
    left_out: dict[str, list[str]] = {}
    try:
        if path.is_dir():
            if params.source == "cifar10":
                raise MirrorFailed("it is a folder; source 'cifar10' needs the archive cifar-10-binary.tar.gz")
            left_out = pack_folder(path, file, params)
            return params.expected.verify(file), left_out
        if not path.is_file():
            raise MirrorFailed("there is no such file or folder")
        with (
            path.open("rb") as read,
            file.open("wb") as write,
            progress(path.name, path.stat().st_size, "bytes") as advance,
        ):
            while block := read.read(COPY_BYTES):
                write.write(block)
                advance(len(block))
    except NightlyError as error:
        raise MirrorFailed(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MirrorFailed(describe(error)) from None
    sha256 = params.expected.verify(file)
    _check_content(file, params)
    return sha256, left_out


def local_path(address: str) -> Path:
    """Return the path that a local address, ``file://`` URL or not, stands for."""
    path = url2pathname(urlsplit(address).path) if address.startswith("file://") else address
    return Path(os.path.expanduser(path))


def pack_folder(root: Path, destination: Path, params: DownloadParams) -> dict[str, list[str]]:
    """Pack a folder's images into a tar that depends on their names and bytes alone.

    Returns:
        the names left out, by reason.

    Raises:
        NightlyError: the folder has no images, or one that stands in no class folder or is over a limit.
    """
    names, left_out = list_folder(root)
    check_folder(names)
    inspector = archives.Inspector(root, **params.limits)

    def members() -> Iterator[tuple[str, bytes]]:
        with progress(f"packing {root}", len(names), "files") as advance:
            for name in names:
                file = root / name
                inspector.admit(name, file.stat().st_size, is_folder=False)
                yield name, file.read_bytes()
                advance(1)

    archives.write_tar(destination, members())
    return left_out


def list_folder(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of a folder's files in natural order, and of what is left out, by reason.

    Links to files are followed if they stay inside, links to folders never: they may loop.
    """
    names: list[str] = []
    left_out: dict[str, list[str]] = {}
    top = root.resolve()

    for folder, folders, files in os.walk(top, onerror=_raise):
        place = Path(folder).relative_to(top)
        if not folders and not files and folder != str(top):
            left_out.setdefault("empty folder", []).append(place.as_posix())
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        left_out.setdefault("link to a folder", []).extend((place / name).as_posix() for name in links)
        for name in files:
            reason = _reason_to_leave(top, Path(folder, name), (place / name).as_posix())
            (left_out.setdefault(reason, []) if reason else names).append((place / name).as_posix())
    natural = natsort_keygen()
    names.sort(key=lambda name: (tuple(natural(part) for part in name.split("/")), name))
    return names, {reason: sorted(found) for reason, found in sorted(left_out.items()) if found}


def _reason_to_leave(top: Path, file: Path, name: str) -> str | None:
    if is_side_file(name):
        return "side file"
    if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(top):
        return "link that leaves the folder"
    if not file.is_file():
        return "broken link" if file.is_symlink() else "special file"
    return None


def _raise(error: OSError) -> None:
    raise error


def _check_content(file: Path, params: DownloadParams) -> None:
    """Walk the archive once, to its end.

    Raises:
        MirrorFailed: it is damaged, unsafe, or does not hold what the source promises.
        NightlyError: the same of bytes that are the expected ones, so that no other mirror will help.
    """
    try:
        members = archives.read_members(file, **params.limits)
        if params.source == "cifar10":
            check_cifar10(members)
        else:
            check_folder(name for name, _ in members)
    except NightlyError as error:
        # The file's path is a passing one here.
        reason = str(error).replace(str(file), "the archive")
        if params.expected.sha256:
            raise NightlyError(f"download: {reason}") from None
        raise MirrorFailed(reason) from None


def check_folder(names: Iterable[str]) -> None:
    """Check that there are images and that each stands in a class folder."""
    images = [name for name in names if not is_side_file(name)]
    if not images:
        raise NightlyError("there are no images; one folder per class is needed, as in cats/1.jpg")
    read_labels(images)


def check_cifar10(members: Iterable[tuple[str, bytes]]) -> None:
    """Check that the members are the binary CIFAR-10's: six files of labeled records and ten class names."""
    needed = {*CIFAR10_BATCHES, "batches.meta.txt"}
    for name, data in members:
        file = PurePosixPath(name).name
        if file in CIFAR10_BATCHES:
            records, rest = divmod(len(data), CIFAR_RECORD_BYTES)
            if rest or not records:
                raise NightlyError(f"{name} has {len(data):,} bytes, no multiple of {CIFAR_RECORD_BYTES:,}")
            highest = int(np.frombuffer(data, np.uint8)[::CIFAR_RECORD_BYTES].max())
            if highest >= CIFAR10_CLASSES:
                raise NightlyError(f"{name} holds the label {highest}, at most {CIFAR10_CLASSES - 1} is allowed")
        elif file == "batches.meta.txt":
            classes = data.decode("utf-8", errors="replace").split()
            if len(classes) != CIFAR10_CLASSES or len(set(classes)) != CIFAR10_CLASSES:
                raise NightlyError(f"{name} holds {len(set(classes))} class names, {CIFAR10_CLASSES} are needed")
        else:
            continue
        if file not in needed:
            raise NightlyError(f"{name} is the second file of its name in the archive")
        needed.remove(file)
    if needed:
        raise NightlyError(f"this is not the binary CIFAR-10: the archive lacks {', '.join(sorted(needed))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=download.__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--partial", type=Path, default=PARTIAL_FOLDER, help="where interrupted downloads wait")
    args = parser.parse_args()
    params = read_section(args.params, "download", DownloadParams)
    summary = download(args.out, params, args.partial)
    for reason, names in summary.left_out.items():
        print(f"left out: {len(names):,} × {reason}, the first is {names[0]!r}")
    print(f"downloaded {summary.file}, {summary.bytes:,} bytes, SHA-256 {summary.sha256}, from {summary.origin}")


if __name__ == "__main__":
    run_main(main)
