"""Archives as they come and as someone hostile would make them."""

import io
import re
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from tasks.archives import archive_suffix, normal_name, read_members, write_tar
from tasks.errors import NightlyError

MEMBERS = {"cat/1.png": b"one", "cat/2.png": b"", "dog/ü 3.png": b"three" * 1000}


def tar_member(name: str, data: bytes = b"x", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for attribute, value in {"size": len(data), **attributes}.items():
        setattr(info, attribute, value)
    return info, data


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w", **options: object) -> Path:
    with tarfile.open(path, mode, **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def make_zip(path: Path, members: dict[str, bytes], **options: object) -> Path:
    with zipfile.ZipFile(path, "w", **options) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix"), [("w", ".tar"), ("w:gz", ".tar.gz"), ("w:bz2", ".tar.bz2"), ("w:xz", ".tar.xz")]
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_any_compression_are_read_in_order(tmp_path: Path, mode: str, suffix: str, form: int) -> None:
    folder = tar_member("./cat/", b"", type=tarfile.DIRTYPE)
    files = [tar_member(f"./{name}", data) for name, data in MEMBERS.items()]
    archive = make_tar(tmp_path / "any-name", folder, *files, mode=mode, format=form)
    assert archive_suffix(archive) == suffix
    assert list(read_members(archive)) == list(MEMBERS.items())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_are_read_in_order(tmp_path: Path, method: int) -> None:
    archive = make_zip(tmp_path / "any-name", {"cat/": b"", **MEMBERS}, compression=method)
    assert archive_suffix(archive) == ".zip"
    assert list(read_members(archive)) == list(MEMBERS.items())


def test_an_empty_archive_has_no_members(tmp_path: Path) -> None:
    assert list(read_members(make_tar(tmp_path / "a.tar"))) == []
    assert list(read_members(make_zip(tmp_path / "a.zip", {}))) == []


def test_resource_forks_are_left_out(tmp_path: Path) -> None:
    names = {"cat/1.png": b"1", "__MACOSX/cat/._1.png": b"2", "cat/._1.png": b"3", "cat/_2.png": b"4"}
    names["__MACOSX/icon.png"] = b"5"
    kept = ["cat/1.png", "cat/_2.png"]
    assert [name for name, _ in read_members(make_zip(tmp_path / "a.zip", names))] == kept
    tar = make_tar(tmp_path / "a.tar", *(tar_member(name, data) for name, data in names.items()))
    assert [name for name, _ in read_members(tar)] == kept


def test_long_names_and_large_members_pass(tmp_path: Path) -> None:
    name = "cat/" + "long/" * 100 + "1.png"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        archive = make_tar(tmp_path / f"{form}.tar", tar_member(name, bytes(9_000_000)), format=form)
        assert [(found, len(data)) for found, data in read_members(archive)] == [(name, 9_000_000)]


def test_a_written_tar_is_the_same_on_every_day(tmp_path: Path) -> None:
    for name in ("first.tar", "second.tar"):
        write_tar(tmp_path / name, MEMBERS.items())
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()
    assert list(read_members(tmp_path / "first.tar")) == list(MEMBERS.items())


BAD_NAMES = [
    ("/etc/passwd", "absolute"),
    ("../up.png", "leads out"),
    ("cat/../../up.png", "leads out"),
    ("cat\\1.png", "backslash"),
    ("C:/1.png", "drive letter"),
    ("c:1.png", "drive letter"),
]


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES)
def test_names_that_could_leave_a_folder_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    for archive in (make_tar(tmp_path / "a.tar", tar_member(name)), make_zip(tmp_path / "a.zip", {name: b"x"})):
        with pytest.raises(NightlyError, match=reason) as raised:
            list(read_members(archive))
        assert repr(name) in str(raised.value)
        assert str(archive) in str(raised.value)


def test_a_folder_may_not_leave_either(tmp_path: Path) -> None:
    with pytest.raises(NightlyError, match="leads out"):
        list(read_members(make_tar(tmp_path / "a.tar", tar_member("../up", b"", type=tarfile.DIRTYPE))))


@pytest.mark.parametrize(("name", "normal"), [("./a//b/./c", "a/b/c"), ("./", ""), ("a:b/c", None), ("ab:c", "ab:c")])
def test_names_are_normalized(name: str, normal: str | None) -> None:
    if normal is None:
        with pytest.raises(ValueError, match="drive letter"):
            normal_name(name)
    else:
        assert normal_name(name) == normal


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "it is a link"),
        (tarfile.LNKTYPE, "it is a link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes, reason: str) -> None:
    odd = tar_member("cat/odd.png", b"", type=kind, linkname="1.png")
    archive = make_tar(tmp_path / "a.tar", tar_member("cat/1.png"), odd)
    with pytest.raises(NightlyError, match=f"'cat/odd.png' is refused: .*{reason}"):
        list(read_members(archive))


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("cat/link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr(info, "../../etc/passwd")
    with pytest.raises(NightlyError, match=r"'cat/link\.png' is refused: it is a link"):
        list(read_members(tmp_path / "a.zip"))


def test_an_empty_name_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"qq.png": b"x"})
    archive.write_bytes(archive.read_bytes().replace(b"qq.png", b"\0q.png"))  # zipfile cuts names at a zero byte
    with pytest.raises(NightlyError, match="it has no name"):
        list(read_members(archive))


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", tar_member("cat/1.png"), tar_member("./cat/1.png", b"other"))
    with pytest.raises(NightlyError, match=r"'cat/1\.png' is refused: the archive holds this name twice"):
        list(read_members(archive))


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"cat/1.png": b"secret"})
    data = bytearray(archive.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(NightlyError, match=r"'cat/1\.png' is refused: it is encrypted"):
        list(read_members(archive))


def test_other_zip_compressions_are_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"cat/1.png": b"x" * 1000}, compression=zipfile.ZIP_LZMA)
    with pytest.raises(NightlyError, match="neither 'stored' nor 'deflate'"):
        list(read_members(archive))


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    latin = make_tar(tmp_path / "a.tar", tar_member("cat/\xe4.png"), encoding="latin-1", format=tarfile.GNU_FORMAT)
    with pytest.raises(NightlyError, match="not UTF-8"):
        list(read_members(latin))
    archive = make_zip(tmp_path / "a.zip", {"cat/xx.png": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"xx.png", b"\xe4\xe4.png"))
    with pytest.raises(NightlyError, match="not UTF-8"):
        list(read_members(archive))


def test_utf8_names_without_the_zip_flag_are_read(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"cat/xx.png": b"1"})
    archive.write_bytes(archive.read_bytes().replace(b"xx.png", "ü.png".encode()))
    assert list(read_members(archive)) == [("cat/ü.png", b"1")]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_cut_tar_is_never_taken_for_a_whole_one(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0)
    members = [tar_member(f"cat/{index}.png", noise.bytes(700)) for index in range(20)]
    whole = make_tar(tmp_path / "whole", *members, mode=mode).read_bytes()
    assert len(list(read_members(tmp_path / "whole"))) == 20
    # The end of a plain tar is padding: a cut there loses nothing.
    end = 20 * 1536 + 1 if mode == "w" else len(whole)
    cuts = {*range(0, end, 397), *range(0, min(end, 20 * 1536), 1536), end - 1}
    for cut in cuts:
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(NightlyError, match=r"cut is damaged, truncated"):
            list(read_members(tmp_path / "cut"))


def test_a_cut_zip_is_refused(tmp_path: Path) -> None:
    whole = make_zip(tmp_path / "whole", MEMBERS).read_bytes()
    for cut in range(1, len(whole), 97):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(NightlyError, match="damaged, truncated"):
            list(read_members(tmp_path / "cut"))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_broken_header_in_the_middle_is_no_end(tmp_path: Path, mode: str) -> None:
    archive = make_tar(tmp_path / "a.tar", *(tar_member(f"cat/{index}.png") for index in range(3)))
    data = bytearray(archive.read_bytes())
    data[1024 + 20] ^= 255
    archive.write_bytes(data if mode == "w" else zlib.compress(data, wbits=31))
    with pytest.raises(NightlyError, match=r"damaged.*after member 'cat/0\.png'"):
        list(read_members(archive))


def test_flipped_bytes_in_compressed_archives_are_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    for archive in (
        make_tar(tmp_path / "a.tar.gz", tar_member("cat/1.png", noise), mode="w:gz"),
        make_zip(tmp_path / "a.zip", {"cat/1.png": noise}),
    ):
        data = bytearray(archive.read_bytes())
        data[2500] ^= 1
        archive.write_bytes(data)
        with pytest.raises(NightlyError, match="damaged"):
            list(read_members(archive))


def test_joined_archives_are_refused(tmp_path: Path) -> None:
    first = make_tar(tmp_path / "1.tar", tar_member("cat/1.png")).read_bytes()
    second = make_tar(tmp_path / "2.tar", tar_member("cat/2.png")).read_bytes()
    (tmp_path / "both.tar").write_bytes(first + second)
    with pytest.raises(NightlyError, match="data after its end mark"):
        list(read_members(tmp_path / "both.tar"))


def test_noise_is_no_archive(tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    for head in (b"", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf", b"<html>"):
        (tmp_path / "noise").write_bytes(head + noise.bytes(3000))
        with pytest.raises(NightlyError, match="damaged, truncated, or no tar or zip"):
            list(read_members(tmp_path / "noise"))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_member_bytes": 99}, "'cat/0.png' is refused: it has 100 bytes, at most 99 are allowed"),
        ({"max_total_bytes": 250}, "'cat/2.png' is refused: the archive unpacks to more than 250 bytes"),
        ({"max_members": 2}, "'cat/2.png' is refused: the archive has more than 2 members"),
    ],
)
def test_limits(tmp_path: Path, limits: dict[str, int], message: str) -> None:
    names = [f"cat/{index}.png" for index in range(3)]
    tar = make_tar(tmp_path / "a.tar", *(tar_member(name, bytes(100)) for name in names))
    packed = make_zip(tmp_path / "a.zip", {name: bytes(100) for name in names})
    for archive in (tar, packed):
        assert len(list(read_members(archive))) == 3
        with pytest.raises(NightlyError, match=re.escape(message)):
            list(read_members(archive, **limits))


def peak_bytes(archive: Path, **limits: int) -> int:
    """Return the most memory that reading took; the archive must be refused."""
    tracemalloc.start()
    try:
        with pytest.raises(NightlyError):
            for _ in read_members(archive, **limits):
                pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_does_not_fill_the_memory(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"cat/1.png": bytes(60_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 100_000
    assert peak_bytes(archive, max_member_bytes=1_000_000) < 3_000_000
    # The same bomb that claims to be small, in both of its headers.
    data = archive.read_bytes()
    archive.write_bytes(data.replace(struct.pack("<I", 60_000_000), struct.pack("<I", 1000)))
    assert peak_bytes(archive, max_member_bytes=1_000_000) < 3_000_000


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_bomb_does_not_fill_the_memory(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, 60_000_000
    packed = zlib.compress(info.tobuf() + bytes(60_000_256), wbits=31)
    (tmp_path / "a.tar.gz").write_bytes(packed)
    assert peak_bytes(tmp_path / "a.tar.gz") < 20_000_000


def test_a_chain_of_headers_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("name")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 512
    (tmp_path / "a.tar").write_bytes((info.tobuf() + b"n".ljust(512, b"\0")) * 3000)
    with pytest.raises(NightlyError, match="damaged"):
        list(read_members(tmp_path / "a.tar"))


def test_padding_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.archives.PADDING_BYTES", 100_000)
    tar = make_tar(tmp_path / "a.tar", tar_member("cat/1.png")).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(zlib.compress(tar + bytes(5_000_000), wbits=31))
    with pytest.raises(NightlyError, match="padding"):
        list(read_members(tmp_path / "b.tar.gz"))


def test_memory_stays_flat_over_many_members(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ((f"cat/{index}.png", bytes(2000)) for index in range(4000)))
    tracemalloc.start()
    count = sum(1 for _ in read_members(tmp_path / "a.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak < 2_000_000  # the names; headers would take twice as much
