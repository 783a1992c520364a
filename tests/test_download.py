"""The download stage against a server that misbehaves, and its sources without one."""

import errno
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tasks import transfer
from tasks.archives import read_members, write_tar
from tasks.download import CIFAR10_SHA256, DownloadParams, download, main
from tasks.errors import NightlyError
from tasks.params import parse_section
from tests.misbehaving_server import MisbehavingServer

RANDOM = np.random.default_rng(7)


def tar_bytes(members: dict[str, bytes], path: Path) -> bytes:
    write_tar(path, members.items())
    return path.read_bytes()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tar of 300 kB with two classes."""
    members = {f"{name}/{index}.jpg": RANDOM.bytes(50_000) for name in ("cat", "dog") for index in range(3)}
    return tar_bytes(members, tmp_path_factory.mktemp("archive") / "images.tar")


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    with MisbehavingServer() as running:
        yield running


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """The output and the folder of partial downloads."""
    return tmp_path / "data" / "raw", tmp_path / "partial"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def params(*urls: str, **given: object) -> DownloadParams:
    quick = {"attempts": 3, "retry_wait_seconds": 0, "timeout_seconds": 5, "minimum_bytes_per_second": 0}
    return DownloadParams(**{"source": "folder", "urls": urls, **quick, **given})


def delivered(out: Path, archive: bytes) -> bool:
    facts = json.loads((out / "source.json").read_text())
    return (out / facts["file"]).read_bytes() == archive and facts["sha256"] == sha256(archive)


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*") if file.suffix in (".partial", ".json"))


# --- HTTP ---


def test_a_good_server_is_asked_once(server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]) -> None:
    out, partial = paths
    summary = download(out, params(server.add("/a.tar", body=archive), sha256=sha256(archive)), partial)
    assert json.loads((out / "source.json").read_text()) == {
        "source": "folder",
        "format": "folder",
        "file": "images.tar",
        "bytes": len(archive),
        "sha256": sha256(archive),
    }
    assert (out / "images.tar").read_bytes() == archive
    assert sorted(file.name for file in out.iterdir()) == ["images.tar", "source.json"]
    assert summary.bytes == len(archive)
    assert len(server.requests) == 1
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert leftovers(partial) == []


def test_dropped_connections_are_resumed(server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=120_000, etag='"v1"')
    download(out, params(url), partial)
    server.finish()
    assert delivered(out, archive)
    assert [request.range for request in server.requests] == [None, "bytes=120000-", "bytes=240000-"]
    assert server.requests[1].headers["if-range"] == '"v1"'
    assert [request.sent for request in server.requests] == [120_000, 120_000, len(archive) - 240_000]


def test_attempts_that_bring_much_do_not_count(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=30_000, etag='"v1"')
    with pytest.raises(NightlyError, match="given up at attempt 3"):
        download(out, params(url), partial)
    monkeypatch.setattr(transfer, "PROGRESS_BYTES", 20_000)
    download(out, params(url), partial)
    assert delivered(out, archive)
    assert len(server.requests) > 6


def test_without_a_validator_nothing_is_continued(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=100_000)
    with pytest.raises(NightlyError, match="peer closed"):
        download(out, params(url, attempts=2), partial)
    server.routes["/a.tar"].drop_after = None
    download(out, params(url, attempts=1), partial)
    assert [request.range for request in server.requests] == [None, None, None]
    assert delivered(out, archive)


def test_a_weak_etag_is_no_validator(server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=100_000, drops=1, etag='W/"v1"')
    with pytest.raises(NightlyError):
        download(out, params(url, attempts=1), partial)
    download(out, params(url), partial)
    assert server.requests[-1].range is None


def test_a_killed_run_is_continued_by_the_next(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=150_000, drops=1)
    with pytest.raises(NightlyError):
        download(out, params(url, sha256=sha256(archive), attempts=1), partial)
    assert not out.exists()
    (part,) = partial.glob("*.partial")
    assert part.stat().st_size == 150_000
    # A kill leaves fewer bytes than the note was written for; any prefix will do.
    os.truncate(part, 99_999)
    download(out, params(url, sha256=sha256(archive)), partial)
    server.finish()
    assert server.requests[-1].range == "bytes=99999-"
    assert server.requests[-1].sent == len(archive) - 99_999
    assert delivered(out, archive)
    assert leftovers(partial) == []


def test_kill_minus_nine_loses_almost_nothing(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drip_bytes=10_000, drip_seconds=0.03)
    (tmp_path / "params.yaml").write_text(
        f"download: {{source: folder, urls: [{url}], sha256: {sha256(archive)}, minimum_bytes_per_second: 0}}"
    )
    arguments = ["--out", str(out), "--params", str(tmp_path / "params.yaml"), "--partial", str(partial)]
    child = subprocess.Popen([sys.executable, "-m", "tasks.download", *arguments])
    deadline = time.monotonic() + 20
    while not any(file.stat().st_size > 100_000 for file in partial.glob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not out.exists()
    server.routes["/a.tar"].drip_bytes = None
    download(out, params(url, sha256=sha256(archive)), partial)
    assert int(server.requests[-1].range.removeprefix("bytes=").removesuffix("-")) > 100_000
    assert delivered(out, archive)


def leave_partial(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], content: bytes, **known: object
) -> str:
    """Break a download off and put ``content`` in place of what had come; return the archive's address."""
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=150_000, drops=1)
    with pytest.raises(NightlyError):
        download(out, params(url, attempts=1, **known), partial)
    next(partial.glob("*.partial")).write_bytes(content)
    return url


def test_a_complete_partial_needs_no_server(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    known = {"sha256": sha256(archive), "size_bytes": len(archive)}
    leave_partial(server, archive, paths, archive, **known)
    download(out, params("http://127.0.0.1:1/nobody.tar", **known), partial)
    assert delivered(out, archive)


def test_complete_bytes_of_unknown_size_are_recognized_by_416(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = leave_partial(server, archive, paths, archive, sha256=sha256(archive))
    download(out, params(url, sha256=sha256(archive)), partial)
    assert [request.status for request in server.requests] == [200, 416]
    assert delivered(out, archive)


def test_too_long_a_partial_is_started_over(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = leave_partial(server, archive, paths, archive + b"more", sha256=sha256(archive))
    download(out, params(url, sha256=sha256(archive)), partial)
    assert [request.status for request in server.requests] == [200, 416, 200]
    assert delivered(out, archive)


def test_a_server_that_ignores_ranges_is_started_over(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=100_000, drops=1, ignore_ranges=True)
    download(out, params(url, sha256=sha256(archive)), partial)
    assert [request.range for request in server.requests] == [None, "bytes=100000-"]
    assert delivered(out, archive)


def test_a_wrong_content_range_is_started_over(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=100_000, drops=1, shift_range=5)
    download(out, params(url, sha256=sha256(archive)), partial)
    assert [request.status for request in server.requests] == [200, 206, 200]
    assert delivered(out, archive)


@pytest.mark.parametrize("honor_if_range", [True, False])
def test_a_file_that_changed_meanwhile_is_started_over(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], tmp_path: Path, honor_if_range: bool
) -> None:
    out, partial = paths
    old = RANDOM.bytes(len(archive))
    url = server.add("/a.tar", body=old, drop_after=100_000, etag='"old"', honor_if_range=honor_if_range)
    with pytest.raises(NightlyError):
        download(out, params(url, attempts=1), partial)
    server.add("/a.tar", body=archive, etag='"new"', honor_if_range=honor_if_range)
    download(out, params(url), partial)
    assert delivered(out, archive)


def test_pieces_of_two_mirrors_are_joined_when_the_checksum_is_known(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    first = server.add("/first.tar", body=archive, drop_after=100_000, drops=1, etag='"a"')
    second = server.add("/second.tar", body=archive, etag='"b"')
    download(out, params(first, second, sha256=sha256(archive), attempts=1), partial)
    assert [(request.path, request.range) for request in server.requests] == [
        ("/first.tar", None),
        ("/second.tar", "bytes=100000-"),
    ]
    assert "if-range" not in server.requests[1].headers
    assert delivered(out, archive)


def test_pieces_of_two_mirrors_are_not_joined_without_a_checksum(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    first = server.add("/first.tar", body=archive, drop_after=100_000, etag='"a"')
    second = server.add("/second.tar", body=archive, etag='"a"')
    download(out, params(first, second, attempts=1), partial)
    assert server.requests[-1].range is None
    assert delivered(out, archive)


def test_joined_pieces_that_are_wrong_do_not_condemn_the_mirror(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    bad = server.add("/bad.tar", body=RANDOM.bytes(len(archive)), drop_after=100_000)
    good = server.add("/good.tar", body=archive)
    download(out, params(bad, good, sha256=sha256(archive), attempts=2), partial)
    assert delivered(out, archive)
    assert [request.path for request in server.requests][-2:] == ["/good.tar", "/good.tar"]
    assert server.requests[-1].range is None


def test_wrong_bytes_are_deleted_and_the_next_mirror_is_asked_from_the_start(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    bad = server.add("/bad.tar", body=RANDOM.bytes(len(archive)))
    good = server.add("/good.tar", body=archive)
    download(out, params(bad, good, sha256=sha256(archive)), partial)
    assert [(request.path, request.range) for request in server.requests] == [("/bad.tar", None), ("/good.tar", None)]
    assert delivered(out, archive)


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_checksum_mismatch_leaves_nothing(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], kind: str
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive)
    wrong = {"sha256": "0" * 64, "md5": "0" * 32}[kind]
    with pytest.raises(NightlyError, match=f"wrong bytes.*{wrong} was expected"):
        download(out, params(url, **{kind: wrong}), partial)
    assert list(out.parent.iterdir()) == []
    assert leftovers(partial) == []


def test_an_older_output_survives_a_failed_download(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive)
    download(out, params(url), partial)
    with pytest.raises(NightlyError):
        download(out, params(url, sha256="0" * 64), partial)
    assert delivered(out, archive)


@pytest.mark.parametrize("announce_extra", [5000, -5000])
def test_a_lie_about_the_length_is_found(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], announce_extra: int
) -> None:
    out, partial = paths
    liar = server.add("/liar.tar", body=archive, announce_extra=announce_extra)
    honest = server.add("/honest.tar", body=archive)
    # Known size: the head of the answer is enough.
    download(out, params(liar, honest, size_bytes=len(archive)), partial)
    assert [request.path for request in server.requests] == ["/liar.tar", "/honest.tar"]
    assert delivered(out, archive)
    # Nothing known: the archive itself must show that it is cut.
    out.rename(out.with_name("before"))
    with pytest.raises(NightlyError):
        download(out, params(liar), partial)
    assert not out.exists()


def test_no_length_and_an_early_end_are_resumed_when_the_size_is_known(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, drop_after=100_000, drops=1, announce_nothing=True, etag='"v"')
    download(out, params(url, size_bytes=len(archive)), partial)
    assert [request.range for request in server.requests] == [None, "bytes=100000-"]
    assert delivered(out, archive)


def test_a_body_without_end_is_stopped(server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=RANDOM.bytes(3_000_000), announce_nothing=True)
    with pytest.raises(NightlyError, match="sends more than 100,000 bytes"):
        download(out, params(url, max_total_bytes=100_000), partial)
    assert leftovers(partial) == []
    server.routes["/a.tar"].announce_nothing = False
    with pytest.raises(NightlyError, match="at most 100,000 are allowed"):
        download(out, params(url, max_total_bytes=100_000), partial)


def test_a_stall_ends_the_attempt_and_is_resumed(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, stall_after=200_000, etag='"v"')
    begin = time.monotonic()
    download(out, params(url, timeout_seconds=0.2), partial)
    assert time.monotonic() - begin < 2
    assert [request.range for request in server.requests] == [None, "bytes=200000-"]
    assert delivered(out, archive)


def test_a_slow_mirror_is_left_and_its_bytes_are_used(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    slow = server.add("/slow.tar", body=archive, drip_bytes=1000, drip_seconds=0.02)
    fast = server.add("/fast.tar", body=archive)
    begin = time.monotonic()
    limits = {"minimum_bytes_per_second": 1_000_000, "minimum_rate_seconds": 0.3}
    download(out, params(slow, fast, sha256=sha256(archive), **limits), partial)
    assert time.monotonic() - begin < 2
    server.finish()
    assert [request.path for request in server.requests] == ["/slow.tar", "/fast.tar"]
    start = int(server.requests[1].range.removeprefix("bytes=").removesuffix("-"))
    assert 0 < start < 50_000
    assert delivered(out, archive)


def test_only_slow_mirrors_is_an_error_that_names_the_setting(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    slow = server.add("/slow.tar", body=archive, drip_bytes=1000, drip_seconds=0.02, etag='"v"')
    limits = {"minimum_bytes_per_second": 1_000_000, "minimum_rate_seconds": 0.2}
    with pytest.raises(NightlyError, match=r"too slow.*download\.minimum_bytes_per_second is 1,000,000"):
        download(out, params(slow, **limits), partial)
    assert leftovers(partial) != []


def test_every_mirror_that_failed_is_named_in_one_line(
    server: MisbehavingServer, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    out, partial = paths
    urls = [server.add(f"/{status}.tar", status=status) for status in (403, 404, 500)]
    urls += ["http://127.0.0.1:1/refused.tar", str(tmp_path / "none.tar"), "http://me:secret@127.0.0.1:1/x?key=secret"]
    with pytest.raises(NightlyError) as raised:
        download(out, params(*urls), partial)
    message = str(raised.value)
    for expected in ("403 Forbidden", "404 Not Found", "500 Internal Server Error", "refused", "none.tar: there is no"):
        assert expected in message
    assert "\n" not in message
    assert "secret" not in message
    asked = [request.path for request in server.requests]
    assert asked == ["/403.tar", "/404.tar", *["/500.tar"] * 3]


def test_a_server_that_is_busy_is_asked_again(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    download(out, params(server.add("/a.tar", body=archive, fail_first=2)), partial)
    assert [request.status for request in server.requests] == [503, 503, 200]
    assert delivered(out, archive)


def test_redirects_keep_the_range(server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]) -> None:
    out, partial = paths
    server.add("/real.tar", body=archive, drop_after=100_000, drops=1, etag='"v"')
    url = server.add("/moved.tar", status=302, headers={"Location": "/real.tar"})
    download(out, params(url), partial)
    assert [(request.path, request.range) for request in server.requests] == [
        ("/moved.tar", None),
        ("/real.tar", None),
        ("/moved.tar", "bytes=100000-"),
        ("/real.tar", "bytes=100000-"),
    ]
    assert delivered(out, archive)


def test_a_redirect_loop_fails(server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]) -> None:
    out, partial = paths
    url = server.add("/loop.tar", status=302, headers={"Location": "/loop.tar"})
    with pytest.raises(NightlyError, match="redirects"):
        download(out, params(url), partial)


def test_404_then_a_file_url(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], tmp_path: Path
) -> None:
    out, partial = paths
    local = tmp_path / "with space é.tar"
    local.write_bytes(archive)
    download(out, params(server.add("/gone.tar", status=404), local.as_uri()), partial)
    assert delivered(out, archive)


def test_a_content_encoding_is_not_undone(server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]) -> None:
    out, partial = paths
    packed = gzip.compress(archive, mtime=0)
    url = server.add("/a.tar.gz", body=packed, headers={"Content-Encoding": "gzip"})
    download(out, params(url, sha256=sha256(packed)), partial)
    assert (out / "images.tar.gz").read_bytes() == packed


def test_a_web_page_instead_of_the_archive_is_no_archive(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    page = server.add("/login.tar", body=b"<html>Please log in</html>" * 100)
    good = server.add("/good.tar", body=archive)
    download(out, params(page, good), partial)
    assert delivered(out, archive)


def test_unverified_bytes_are_called_so_with_the_digest_to_pin(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive)
    download(out, params(url), partial)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert f"sha256: {sha256(archive)}" in warning
    download(out, params(url, sha256=sha256(archive).upper()), partial)
    assert "warning" not in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_keeps_what_came(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive)
    real_open = Path.open

    class Full(io.FileIO):
        def write(self, data: bytes) -> int:
            if self.tell() + len(data) > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def small_disk(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if path.suffix == ".partial" and mode == "ab":
            return io.BufferedWriter(Full(path, "ab"))
        return real_open(path, mode, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", small_disk)
        with pytest.raises(NightlyError, match=r"the disk is full: [\d,]+ bytes are kept in .*free some space"):
            download(out, params(url, sha256=sha256(archive)), partial)
    (part,) = partial.glob("*.partial")
    kept = part.stat().st_size
    assert 0 < kept <= 100_000
    assert archive.startswith(part.read_bytes())
    assert list(out.parent.iterdir()) == []
    download(out, params(url, sha256=sha256(archive)), partial)
    assert server.requests[-1].range == f"bytes={kept}-"
    assert delivered(out, archive)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "http://user:password@proxy.invalid:3128"])
def test_a_proxy_is_not_asked_for_this_machine(
    server: MisbehavingServer,
    archive: bytes,
    paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    proxy: str,
) -> None:
    out, partial = paths
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    download(out, params(server.add("/a.tar", body=archive)), partial)
    assert delivered(out, archive)


def test_a_second_download_into_the_same_folder_is_refused(
    server: MisbehavingServer, archive: bytes, paths: tuple[Path, Path]
) -> None:
    out, partial = paths
    url = server.add("/a.tar", body=archive, stall_after=1000)
    failed: list[str] = []

    def second() -> None:
        deadline = time.monotonic() + 2
        while not server.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            download(out.with_name("other"), params(url), partial)
        except NightlyError as error:
            failed.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    with pytest.raises(NightlyError):
        download(out, params(url, timeout_seconds=0.5, attempts=1), partial)
    thread.join()
    assert len(failed) == 1
    assert "another download is at work" in failed[0]


# --- parameters ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "folder"}, "source 'folder' needs 'urls' or 'path'"),
        ({"source": "cifar10"}, "source 'cifar10' needs 'urls' or 'path'"),
        ({"source": "digits", "path": "x"}, "source 'digits' is embedded and takes no 'path'"),
        ({"source": "digits", "sha256": "0" * 64}, "takes no 'sha256'"),
        ({"source": "folder", "path": "x", "urls": ["y"]}, "give 'urls' or 'path', not both"),
        ({"source": "folder", "path": ""}, "path"),
        ({"source": "folder", "urls": ["ftp://host/x.tar"]}, "must begin with http://, https:// or file://"),
        ({"source": "folder", "urls": ["https:///x.tar"]}, "names no host"),
        ({"source": "folder", "urls": ["file://host/x.tar"]}, "must name this machine's file"),
        ({"source": "folder", "path": "x", "sha256": "abc"}, "'download.sha256'"),
        ({"source": "folders"}, "'digits', 'cifar10' or 'folder'"),
        ({"source": "folder", "path": "x", "sha265": "0" * 64}, "did you mean 'sha256'"),
        ({"attempts": 0}, "'download.attempts'"),
    ],
)
def test_parameters_that_make_no_sense_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(NightlyError, match=re.escape(message)):
        parse_section(given, "download", DownloadParams, Path("params.yaml"))


def test_the_original_facts_hold_for_cifar10_unless_any_is_given() -> None:
    original = params("x", source="cifar10").expected
    assert (original.size_bytes, original.sha256) == (170_052_171, CIFAR10_SHA256)
    own = params("x", source="cifar10", size_bytes=5).expected
    assert (own.size_bytes, own.sha256) == (5, None)
    assert params("x").expected.sha256 is None


def test_one_address_needs_no_list() -> None:
    assert DownloadParams(source="folder", urls="a.tar").urls == ("a.tar",)


# --- folders and local archives ---


def make_folder(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"bytes of {name}".encode())
    return root


def packed_names(out: Path) -> list[str]:
    return [name for name, _ in read_members(out / "images.tar")]


def test_a_folder_is_packed_in_natural_order(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    root = make_folder(tmp_path / "in", ["10/1.png", "2/b10.png", "2/b9.png", "2/b1.png", "9/ü.png"])
    download(paths[0], params(path=str(root), urls=()))
    assert packed_names(paths[0]) == ["2/b1.png", "2/b9.png", "2/b10.png", "9/ü.png", "10/1.png"]
    assert dict(read_members(paths[0] / "images.tar"))["2/b9.png"] == b"bytes of 2/b9.png"


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    names = ["train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/01.png", "test/dog/1.png"]
    first = make_folder(tmp_path / "first", names)
    second = make_folder(tmp_path / "second", names[::-1])
    for file in second.rglob("*.png"):
        os.utime(file, (1, 1))
        file.chmod(0o600)
    facts = [download(tmp_path / f"out-{root.name}", params(path=str(root), urls=())) for root in (first, second)]
    assert facts[0].sha256 == facts[1].sha256
    with tarfile.open(tmp_path / "out-first" / "images.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in tar} == {
            (0, 0, 0, "", 0o644)
        }


def test_side_files_and_odd_files_are_left_out_and_counted(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    root = make_folder(
        tmp_path / "in", ["cat/1.png", "cat/Thumbs.db", "cat/.hidden", ".git/config", "dog/2.png", "README.md"]
    )
    outside = make_folder(tmp_path / "outside", ["secret.png"])
    (root / "bird").mkdir()
    (root / "cat" / "inside.png").symlink_to(root / "dog" / "2.png")
    (root / "cat" / "outside.png").symlink_to(outside / "secret.png")
    (root / "cat" / "broken.png").symlink_to(root / "none.png")
    (root / "cat" / "self.png").symlink_to(root / "cat" / "self.png")
    (root / "cat" / "loop").symlink_to(root)
    os.mkfifo(root / "cat" / "pipe.png")
    summary = download(paths[0], params(path=str(root), urls=()))
    assert packed_names(paths[0]) == ["cat/1.png", "cat/inside.png", "dog/2.png"]
    assert summary.left_out == {
        "broken link": ["cat/broken.png", "cat/self.png"],
        "empty folder": ["bird"],
        "link that leaves the folder": ["cat/outside.png"],
        "link to a folder": ["cat/loop"],
        "side file": [".git/config", "README.md", "cat/.hidden", "cat/Thumbs.db"],
        "special file": ["cat/pipe.png"],
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there are no images"),
        (["cat/.hidden", "readme.txt"], "there are no images"),
        (["1.png", "2.png"], "'1.png' stands where no class can be read off"),
        (["cat/1.png", "loose.png"], "'loose.png' stands"),
        (["cat/1.png", "cat/deep/er/2.png"], "'cat/deep/er/2.png' stands"),
        (["cat/a\\b.png", "dog/1.png"], "backslash"),
    ],
)
def test_a_folder_without_class_folders_is_refused(
    tmp_path: Path, paths: tuple[Path, Path], names: list[str], message: str
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    make_folder(root, names)
    with pytest.raises(NightlyError, match=re.escape(message)) as raised:
        download(paths[0], params(path=str(root), urls=()))
    assert str(root) in str(raised.value)
    assert list(paths[0].parent.iterdir()) == []


def test_file_names_that_are_not_utf8_are_refused(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    root = make_folder(tmp_path / "in", ["cat/1.png"])
    with open(os.fsencode(root) + b"/cat/\xff.png", "wb") as file:
        file.write(b"x")
    with pytest.raises(NightlyError, match="not UTF-8"):
        download(paths[0], params(path=str(root), urls=()))


def test_an_unmounted_folder_gives_way_to_the_next_address(
    tmp_path: Path, paths: tuple[Path, Path], archive: bytes
) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "good.tar").write_bytes(archive)
    download(paths[0], params(str(tmp_path / "mount"), str(tmp_path / "good.tar")))
    assert delivered(paths[0], archive)


def test_a_local_archive_is_copied_and_named_by_its_bytes(
    tmp_path: Path, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "misnamed.tar", "w") as made:
        made.writestr("cat/1.png", b"1")
        made.writestr("dog/2.png", b"2")
    summary = download(paths[0], params(path="~/misnamed.tar", urls=()))
    assert summary.file == "images.zip"
    copy = paths[0] / "images.zip"
    assert copy.read_bytes() == (tmp_path / "misnamed.tar").read_bytes()
    assert copy.stat().st_ino != (tmp_path / "misnamed.tar").stat().st_ino


def test_a_local_archive_that_is_cut_or_not_the_expected_one_is_refused(
    tmp_path: Path, paths: tuple[Path, Path], archive: bytes
) -> None:
    (tmp_path / "cut.tar").write_bytes(archive[:200_000])
    with pytest.raises(NightlyError, match=r"cut\.tar: the archive is damaged, truncated.*after member 'cat/2"):
        download(paths[0], params(path=str(tmp_path / "cut.tar"), urls=()))
    (tmp_path / "good.tar").write_bytes(archive)
    with pytest.raises(NightlyError, match="wrong bytes"):
        download(paths[0], params(path=str(tmp_path / "good.tar"), urls=(), sha256="1" * 64))
    assert list(paths[0].parent.iterdir()) == []


# --- CIFAR-10 ---


def cifar10_members(records: int = 3) -> dict[str, bytes]:
    batch = b"".join(bytes([index % 10]) + bytes(3072) for index in range(records))
    batches = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    members = {f"cifar-10-batches-bin/{name}": batch for name in batches}
    members["cifar-10-batches-bin/readme.html"] = b"hello"
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(f"class{index}" for index in range(10)).encode()
    return members


def cifar10_archive(path: Path, **changed: bytes | None) -> str:
    members = {**cifar10_members(), **{f"cifar-10-batches-bin/{name}": data for name, data in changed.items()}}
    data = tar_bytes({name: data for name, data in members.items() if data is not None}, path)
    path.write_bytes(gzip.compress(data, mtime=0))
    return sha256(path.read_bytes())


def test_cifar10_is_verified_and_kept_as_it_came(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    source = tmp_path / "cifar.tar.gz"
    digest = cifar10_archive(source)
    summary = download(paths[0], params(str(source), source="cifar10", sha256=digest))
    assert (summary.source, summary.format, summary.file) == ("cifar10", "cifar10-binary", "cifar-10-binary.tar.gz")
    assert (paths[0] / summary.file).read_bytes() == source.read_bytes()
    with pytest.raises(NightlyError, match="170,052,171 were expected"):
        download(tmp_path / "other", params(str(source), source="cifar10"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_batch.bin": None}, "the archive lacks test_batch.bin"),
        ({"data_batch_2.bin": bytes(3072)}, "data_batch_2.bin has 3,072 bytes, no multiple of 3,073"),
        ({"data_batch_2.bin": bytes(3074)}, "data_batch_2.bin has 3,074 bytes"),
        ({"data_batch_2.bin": b""}, "data_batch_2.bin has 0 bytes"),
        ({"data_batch_3.bin": b"\x0a" + bytes(3072)}, "holds the label 10, at most 9"),
        ({"batches.meta.txt": b"cat\ndog\n"}, "holds 2 class names, 10 are needed"),
        ({"again/test_batch.bin": bytes(3073)}, "second file of its name"),
    ],
)
def test_cifar10_with_another_content_is_refused(
    tmp_path: Path, paths: tuple[Path, Path], changed: dict[str, bytes | None], message: str
) -> None:
    digest = cifar10_archive(tmp_path / "cifar.tar.gz", **changed)
    for known in ({"sha256": digest}, {"size_bytes": (tmp_path / "cifar.tar.gz").stat().st_size}):
        with pytest.raises(NightlyError, match=re.escape(message)):
            download(paths[0], params(str(tmp_path / "cifar.tar.gz"), source="cifar10", **known))
    assert list(paths[0].parent.iterdir()) == []


def test_cifar10_wants_the_archive_not_a_folder(tmp_path: Path, paths: tuple[Path, Path]) -> None:
    with pytest.raises(NightlyError, match="needs the archive"):
        download(paths[0], params(str(tmp_path), source="cifar10"))


# --- digits and the command ---


def test_digits_are_the_scanned_ones_and_always_the_same_bytes(tmp_path: Path) -> None:
    import cv2
    from sklearn.datasets import load_digits

    summaries = [download(tmp_path / name, DownloadParams()) for name in ("first", "second")]
    assert summaries[0].sha256 == summaries[1].sha256
    assert (summaries[0].source, summaries[0].format, summaries[0].file) == ("digits", "folder", "digits.tar")
    members = dict(read_members(tmp_path / "first" / "digits.tar"))
    digits = load_digits()
    assert len(members) == len(digits.images) == 1797
    for index in (0, 17, 1796):
        data = members[f"{digits.target[index]}/{index:04d}.png"]
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert pixels.shape == (8, 8)
        np.testing.assert_array_equal(pixels, np.rint(digits.images[index] * 255 / 16))


def test_the_command_reads_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "in", ["cat/1.png", "cat/.DS_Store", "dog/2.png"])
    (tmp_path / "params.yaml").write_text(f"download:\n  source: folder\n  path: {root}\n")
    out = tmp_path / "raw"
    arguments = ["download", "--out", str(out), "--params", str(tmp_path / "params.yaml")]
    monkeypatch.setattr("sys.argv", [*arguments, "--partial", str(tmp_path / "partial")])
    main()
    printed = capsys.readouterr().out
    assert "left out: 1 × side file, the first is 'cat/.DS_Store'" in printed
    assert "downloaded images.tar" in printed
    assert packed_names(out) == ["cat/1.png", "dog/2.png"]
