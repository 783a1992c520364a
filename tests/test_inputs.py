"""What a batch prediction classifies: every kind of input, with the names and accidents of real ones."""

import contextlib
import datetime
import io
import itertools
import os
import socket
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from natsort import natsorted

import tasks.inputs
import tasks.members
import tasks.objects
from tasks.errors import NightlyError
from tasks.images import Status
from tasks.inputs import Fetched, Input, Listing, matcher, natural_order, open_input, read_file
from tests import test_archives
from tests.hostile import encoded, hostile_images, photo
from tests.test_archives import make_zip

MEGABYTE = 2**20
#: A name in each of the ways that a file system allows and programs forget.
STRANGE = ["été 🐈.png", "two\nlines.png", os.fsdecode(b"latin-\xe9.png"), " .png", "a\\b.png", "-.png", "a[1]*?.png"]
PNG = encoded(photo(), "PNG")


def write(folder: Path, *names: str, data: bytes = b"x") -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return folder


@contextlib.contextmanager
def opened(source: object, scratch: Path | None = None, **options: object) -> Iterator[Input]:
    found = open_input(str(source), scratch or Path("no-scratch-is-needed"), **options)
    with contextlib.closing(found):
        yield found


def found(source: object, scratch: Path | None = None, **options: object) -> Listing:
    with opened(source, scratch) as files:
        return files.find(**options)


def outcome(fetched: Fetched) -> tuple[bytes | None, Status | None]:
    assert (fetched.data is None) == (fetched.status is not None) == bool(fetched.reason)
    assert fetched.reason.isascii()
    assert "\n" not in fetched.reason
    return fetched.data, fetched.status


# Directories


def test_a_directory_is_listed_to_its_depth_in_natural_order(tmp_path: Path) -> None:
    write(tmp_path, "10.png", "2.png", "b/1.png", "b/c/3.png", "a/x.jpg", data=b"123")
    os.utime(tmp_path / "2.png", ns=(1, 1_700_000_000_123_456_789))
    with opened(tmp_path) as files:
        listing = files.find()
        assert (files.kind, files.source) == ("directory", str(tmp_path))
        assert listing.paths == ["2.png", "10.png", "a/x.jpg", "b/1.png", "b/c/3.png"]
        assert listing.sizes.tolist() == [3] * 5
        assert listing.mtimes[0] == 1_700_000_000_123_456_789
        assert listing.sizes.dtype == listing.mtimes.dtype == np.int64
        assert files.fetch("b/c/3.png", 3) == Fetched(b"123", 3)
        assert files.local("b/c/3.png") == tmp_path / "b/c/3.png"


def test_an_empty_directory_is_an_empty_listing(tmp_path: Path) -> None:
    listing = found(tmp_path)
    assert listing.paths == []
    assert listing.sizes.shape == listing.mtimes.shape == (0,)


def test_hidden_and_side_files_are_counted_apart(tmp_path: Path) -> None:
    write(tmp_path, "1.png", ".2.png", "Thumbs.db", "notes.txt", ".git/objects/3.png", "a/.b/c/4.png", "__MACOSX/5.png")
    listing = found(tmp_path)
    assert listing.paths == ["1.png"]
    assert listing.side_files == 6


def test_links_to_files_are_files_and_links_to_folders_are_nothing(tmp_path: Path) -> None:
    write(tmp_path, "images/1.png", data=b"12345")
    write(tmp_path, "elsewhere/2.png")
    images = tmp_path / "images"
    (images / "file").symlink_to(images / "1.png")
    (images / "dangling").symlink_to(images / "nowhere")
    (images / "itself").symlink_to(images / "itself")
    (images / "loop").symlink_to(images)
    (images / "other").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(images / "pipe.png")
    with opened(images) as files:
        listing = files.find()
        assert listing.paths == ["1.png", "dangling", "file", "itself", "pipe.png"]
        assert listing.sizes.tolist() == [5, -1, 5, -1, 0]
        assert listing.mtimes[1] == listing.mtimes[3] == 0
        assert files.fetch("pipe.png", 9).status == Status.UNREADABLE
        assert files.fetch("file", 9).data == b"12345"
        assert files.fetch("dangling", 9).status == Status.VANISHED
        assert files.fetch("itself", 9).status == Status.UNREADABLE


def test_a_folder_that_cannot_be_listed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1.png", "locked/2.png", ".hidden/3.png")
    scan, opening = os.scandir, os.open

    def refuse(function: Callable) -> Callable:
        def checked(path: str, *rest: int) -> object:
            if str(path).rstrip("/").endswith(("locked", ".hidden")):
                raise PermissionError(13, "Permission denied", path)
            return function(path, *rest)

        return checked

    monkeypatch.setattr(os, "scandir", refuse(scan))
    with opened(tmp_path) as files:
        listing = files.find()
        assert listing.paths == ["1.png", "locked"]
        assert listing.side_files == 1
        assert listing.sizes.tolist() == [1, -1]
        assert files.fetch("locked", 9) == Fetched(None, 0, Status.UNREADABLE, "not a regular file")
        monkeypatch.setattr(os, "open", refuse(opening))
        assert files.fetch("locked", 9) == Fetched(None, 0, Status.UNREADABLE, "Permission denied")
    with pytest.raises(PermissionError):
        found(tmp_path / "locked")


def test_a_folder_too_deep_for_the_system_ends_in_a_row(tmp_path: Path) -> None:
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("d" * 200, dir_fd=place)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(place)
    with opened(tmp_path) as files:
        (path,) = files.find().paths
        assert outcome(files.fetch(path, 9)) == (None, Status.UNREADABLE)


def test_strange_names_survive(tmp_path: Path) -> None:
    write(tmp_path, *STRANGE, *(f"{name}/{name}" for name in ("d🐈\n", os.fsdecode(b"\xff"))))
    with opened(tmp_path) as files:
        listing = files.find()
        assert sorted(listing.paths) == sorted([*STRANGE, "d🐈\n/d🐈\n", os.fsdecode(b"\xff/\xff")])
        for path in listing.paths:
            assert files.fetch(path, 9) == Fetched(b"x", 1), path
    (tmp_path / "-.png").unlink()
    assert files.fetch("-.png", 9).status == Status.VANISHED


@pytest.mark.parametrize("name", STRANGE)
def test_one_file_is_itself_whatever_its_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, "other.png")
    with opened(tmp_path / name) as files:
        assert files.kind == "file"
        assert files.find().paths == [name]
        assert files.fetch(name, 9).data == b"x"


def test_one_file_is_meant_even_if_it_is_hidden_or_a_pipe(tmp_path: Path) -> None:
    assert found(write(tmp_path, ".a.png") / ".a.png").paths == [".a.png"]
    os.mkfifo(tmp_path / "pipe.txt")
    with opened(tmp_path / "pipe.txt") as files:
        assert files.find().paths == ["pipe.txt"]
        assert files.fetch("pipe.txt", 9).status == Status.UNREADABLE


# Reading a file


def test_every_kind_of_file_is_read_whole(tmp_path: Path) -> None:
    for name, (data, _) in hostile_images().items():
        (tmp_path / name).write_bytes(data)
        assert read_file(tmp_path / name, len(data)) == Fetched(data, len(data)), name
    (tmp_path / "link").symlink_to("rgb.png")
    assert outcome(read_file(str(tmp_path / "link"), MEGABYTE)) == (hostile_images()["rgb.png"][0], None)


def test_what_is_no_file_is_unreadable_at_once_and_what_is_gone_has_vanished(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, "file", "folder/file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    names = {
        Status.UNREADABLE: ["pipe", "folder", "loop", "socket", "zero\0byte", "\ud800", "d" * 300, "/dev/zero"],
        Status.VANISHED: ["missing", "dangling", "folder/missing", "file/inside", "pipe/inside"],
    }
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        before = len(os.listdir("/dev/fd"))
        for status, group in names.items():
            for name in group:
                fetched = read_file(os.path.join(tmp_path, name), MEGABYTE)
                assert (*outcome(fetched), fetched.size) == (None, status, 0), name
        assert len(os.listdir("/dev/fd")) == before


def test_a_pipe_with_a_writer_is_not_waited_for_either(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    keep = os.open(pipe, os.O_RDWR)
    begin = time.monotonic()
    assert read_file(pipe, 9).status == Status.UNREADABLE
    assert time.monotonic() - begin < 1
    os.close(keep)


def test_the_limit_on_bytes_is_checked_before_reading(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    assert read_file(tmp_path / "huge", 2**40 - 1) == Fetched(
        None, 2**40, Status.TOO_LARGE, f"{2**40} bytes, allowed: {2**40 - 1}"
    )
    assert read_file(write(tmp_path, "a", data=b"12") / "a", 2) == Fetched(b"12", 2)
    assert read_file(tmp_path / "a", 1).status == Status.TOO_LARGE
    assert read_file(write(tmp_path, "none", data=b"") / "none", 1) == Fetched(b"", 0)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_what_cannot_be_opened_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "open", fail)
    assert read_file(tmp_path / "a", 9) == Fetched(None, 0, Status.UNREADABLE, error.strerror)


def test_a_disk_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fail)
    assert read_file(tmp_path / "a", 9) == Fetched(None, 1, Status.UNREADABLE, "Input/output error")
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    assert read_file(tmp_path / "a", 9).status == Status.TOO_LARGE


# Natural order

NAMES = st.text(st.characters(exclude_characters="\0"), max_size=12)
NUMBERED = st.text(st.sampled_from("ab0123456789/ .-!é\u0301²٣𝟚"), max_size=14)


@settings(max_examples=400, deadline=None)
@given(st.lists(NAMES | NUMBERED, max_size=30))
def test_the_order_is_natsorts(names: list[str]) -> None:
    order = natural_order(names)
    assert [names[index] for index in order] == natsorted(sorted(names))
    assert sorted(order) == list(range(len(names)))


def test_the_order_does_not_depend_on_the_disks(tmp_path: Path) -> None:
    names = ["a1", "a01", "a001", "a\u00e9", "ae\u0301", "a" + "9" * 400, "a" + "9" * 399 + "8", "a" + "1" * 5000]
    expected = [names[index] for index in natural_order(names)]
    for other in itertools.islice(itertools.permutations(names), 0, None, 501):
        assert [other[index] for index in natural_order(other)] == expected


# Patterns

PATHS = ["1.jpg", "2.png", "a/1.jpg", "a/b/1.jpg", "a/b/2.png", "b/a/1.jpg", "cats/x.JPG", "b/cats"]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.jpg", {"1.jpg", "a/1.jpg", "a/b/1.jpg", "b/a/1.jpg"}),
        ("/*.jpg", {"1.jpg"}),
        ("a/**", {"a/1.jpg", "a/b/1.jpg", "a/b/2.png"}),
        ("a/*", {"a/1.jpg", "a/b/1.jpg", "a/b/2.png"}),
        ("a", {"a/1.jpg", "a/b/1.jpg", "a/b/2.png", "b/a/1.jpg"}),
        ("/a", {"a/1.jpg", "a/b/1.jpg", "a/b/2.png"}),
        ("a/", {"a/1.jpg", "a/b/1.jpg", "a/b/2.png", "b/a/1.jpg"}),
        ("a/b/", {"a/b/1.jpg", "a/b/2.png"}),
        ("cats/", {"cats/x.JPG"}),
        ("cats", {"cats/x.JPG", "b/cats"}),
        ("**/b/*.png", {"a/b/2.png"}),
        ("a/**/1.jpg", {"a/1.jpg", "a/b/1.jpg"}),
        ("**", set(PATHS)),
        ("?.[jp][pn]g", {path for path in PATHS if path.endswith(("jpg", "png"))}),
        ("[!1].*", {"2.png", "a/b/2.png", "cats/x.JPG"}),
        ("*.JPG", {"cats/x.JPG"}),
        ("nothing", set()),
    ],
)
def test_patterns_mean_what_they_mean_in_a_gitignore(tmp_path: Path, pattern: str, matched: set[str]) -> None:
    matches = matcher([pattern])
    assert {path for path in PATHS if matches(path)} == matched
    write(tmp_path, *PATHS)
    listing = found(tmp_path, include=[pattern])
    assert set(listing.paths) == matched
    assert listing.excluded == len(PATHS) - len(matched)
    listing = found(tmp_path, exclude=[pattern])
    assert set(listing.paths) == set(PATHS) - matched
    assert listing.excluded == len(matched)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PATHS),
    st.lists(st.sampled_from(["a", "b", "*", "**", "?.jpg", "1.*", "cats", "[ab]"]), min_size=1, max_size=3),
)
def test_patterns_agree_with_gits(path: str, parts: list[str]) -> None:
    """The reference is pathspec, DVC's own reading of .gitignore files."""
    import pathspec

    pattern = "/".join(parts)
    if pattern.endswith("**/**") or "**/**" in pattern:
        return
    reference = pathspec.GitIgnoreSpec.from_lines([pattern])
    assert matcher([pattern])(path) == reference.match_file(path), pattern


def test_exclude_wins_over_include_and_side_files_are_no_excluded_ones(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "2.jpg", "3.png", ".4.jpg", "5.txt")
    listing = found(tmp_path, include=["*.jpg", "3*"], exclude=["2*"])
    assert listing.paths == ["1.jpg", "3.png"]
    assert (listing.excluded, listing.side_files) == (1, 2)


def test_patterns_match_strange_names_and_bad_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path, *STRANGE)
    assert set(found(tmp_path, include=["*.png"]).paths) == set(STRANGE)
    with pytest.raises(NightlyError, match=r"pattern 'a\*\*b' is not understood: .*entire path component"):
        found(tmp_path, include=["a**b"])


# Globs


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("photos/*.jpg", ["1.jpg"]),
        ("photos/**/*.jpg", ["1.jpg", "a/1.jpg", "a/b/1.jpg", "b/a/1.jpg"]),
        ("photos/*/*.jpg", ["a/1.jpg", "b/a/1.jpg"][:1]),
        ("photos/a/**", ["1.jpg", "b/1.jpg", "b/2.png"]),
        ("photos/?/b/*", ["a/b/1.jpg", "a/b/2.png"]),
        ("photos/[ab]/1.jpg", ["a/1.jpg"]),
        ("photos/*.gif", []),
    ],
)
def test_a_glob_matches_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, paths: list) -> None:
    write(tmp_path / "photos", *PATHS)
    monkeypatch.chdir(tmp_path)
    for source in (pattern, str(tmp_path / pattern), f"./{pattern}"):
        with opened(source) as files:
            listing = files.find()
            assert files.kind == "glob"
            assert listing.paths == paths
            assert listing.excluded == 0
            assert all(files.fetch(path, 9).data == b"x" for path in paths)
            assert all(files.local(path).is_file() for path in paths)


def test_a_glob_may_begin_at_the_top_of_everything() -> None:
    with opened("/no-such-thing-*.png") as files:
        assert files.find().paths == []
        assert files.local("1.png") == Path("/1.png")


def test_a_glob_goes_no_deeper_than_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1.jpg", "a/2.jpg", "a/b/3.jpg")
    seen, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(os.path.relpath(path, tmp_path)) or scan(path))
    assert found(tmp_path / "*.jpg").paths == ["1.jpg"]
    assert seen == ["."]
    assert found(tmp_path / "*" / "*.jpg").paths == ["a/2.jpg"]
    assert seen == [".", ".", "a"]


def test_a_glob_leaves_side_files_out_and_enters_no_loop(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", ".2.jpg", "3.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    listing = found(tmp_path / "**" / "*")
    assert listing.paths == ["1.jpg"]
    assert listing.side_files == 2


def test_wildcards_in_an_existing_name_are_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "set [1]/1.jpg", "set 1/2.jpg", "*/3.jpg", "set [1]/x*.jpg")
    with opened(tmp_path / "set [1]") as files:
        assert files.kind == "directory"
        assert files.find().paths == ["1.jpg", "x*.jpg"]
    assert found(tmp_path / "*").paths == ["3.jpg"]
    assert found(tmp_path / "set [1]" / "*.jpg").paths == ["1.jpg", "x*.jpg"]
    with opened(tmp_path / "set [1]" / "x*.jpg") as files:
        assert files.kind == "file"
    monkeypatch.chdir(tmp_path / "set [1]")
    assert found("?.jpg").paths == ["1.jpg"]


@pytest.mark.parametrize("source", ["", "nowhere", "nowhere/*.jpg", "dangling", "x" * 300])
def test_a_source_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(NightlyError, match=r"there is nothing at .*give a directory, an image.*s3://") as raised:
        open_input(source, tmp_path)
    assert f"'{source}'" in str(raised.value)


# Lists


@pytest.mark.parametrize("suffix", [".txt", ".lst", ".LIST"])
@pytest.mark.parametrize("text", ["b/10.png\n\nb/2.png\r\n  \n./b//2.png\n{0}/c.png\nb\nnowhere.png", None])
def test_a_list_is_relative_to_its_folder(tmp_path: Path, suffix: str, text: str | None) -> None:
    write(tmp_path / "lists", "b/10.png", "b/2.png", data=b"123")
    write(tmp_path, "c.png")
    if text is None:
        text = "b/10.png\0b/2.png\0b/2.png\0\0{0}/c.png\0b\0nowhere.png\0"
    file = tmp_path / "lists" / f"all{suffix}"
    file.write_text("\ufeff" + text.format(tmp_path), newline="")
    with opened(file) as files:
        listing = files.find()
        assert files.kind == "list"
        assert listing.paths == [f"{tmp_path}/c.png", "b", "b/2.png", "b/10.png", "nowhere.png"]
        assert listing.sizes[[0, 2, 3, 4]].tolist() == [1, 3, 3, -1]
        assert listing.repeated == 1
        outcomes = [outcome(files.fetch(path, 9)) for path in listing.paths]
        unreadable, vanished = (None, Status.UNREADABLE), (None, Status.VANISHED)
        assert outcomes == [(b"x", None), unreadable, (b"123", None), (b"123", None), vanished]
        assert files.local("b/2.png") == tmp_path / "lists/b/2.png"
        assert files.local(f"{tmp_path}/c.png") == tmp_path / "c.png"


def test_what_a_list_names_is_meant_even_if_it_is_hidden(tmp_path: Path) -> None:
    write(tmp_path, ".a.png", "b.txt", "folder/x")
    (tmp_path / "folder" / "list.txt").write_text("../.a.png\n../b.txt\nx")
    listing = found(tmp_path / "folder" / "list.txt")
    assert listing.paths == ["../.a.png", "../b.txt", "x"]
    assert listing.side_files == 0
    assert found(tmp_path / "folder" / "list.txt", exclude=["*.txt"]).excluded == 1
    assert matcher(["*.png", "b/"])("/a.png")
    assert matcher(["*.png", "b/"])("/b/a")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name), max_size=8, unique=True),
    st.booleans(),
    st.integers(1, 9),
)
def test_every_path_of_a_list_comes_out_once(names: list[bytes], lines: bool, piece: int) -> None:
    if lines:
        names = [name for name in names if name.strip() and not set(name) & set(b"\r\n")]
    names = [name for name in names if not name.startswith(b"\xef\xbb\xbf")]
    text = b"".join(name + (b"\n" if lines else b"\0") for name in names)
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    with opened("-", names=lambda: pieces) as files:
        listing = files.find()
    wanted = [str(Path(os.fsdecode(name))) for name in names]
    assert sorted(listing.paths) == sorted(set(wanted))
    assert listing.repeated == len(wanted) - len(listing.paths)


def test_standard_input_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"\xff.png")
    write(tmp_path, "1.png", name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff.png\n1.png\n1.png\n")))
    with opened("-") as files:
        monkeypatch.chdir("/")  # as a worker elsewhere may be
        assert files.kind == "stdin"
        listing = files.find()
        assert listing.paths == ["1.png", name]
        assert listing.repeated == 1
        assert files.fetch(name, 9).data == b"x"
        assert files.local("1.png") == tmp_path / "1.png"


def test_standard_input_is_not_read_before_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "1.png")
    monkeypatch.chdir(tmp_path)
    with opened("-", names=lambda: pytest.fail("it was read")) as files:
        assert files.fetch("1.png", 9).data == b"x"


# Archives

MEMBERS = {"b/10.png": PNG, "b/2.png": b"", "été 🐈\n.png": b"three" * 1000, "b/c d/1.png": b"1"}
NATURAL = ["b/2.png", "b/10.png", "b/c d/1.png", "été 🐈\n.png"]


def tar_member(name: str, data: bytes = b"", **attributes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for attribute, value in {"size": len(data), **attributes}.items():
        setattr(info, attribute, value)
    return info, data


def make_tar(path: Path, members: object, mode: str = "w", **options: object) -> Path:
    members = [tar_member(name, data) for name, data in members.items()] if isinstance(members, dict) else members
    return test_archives.make_tar(path, *members, mode=mode, **options)


def archive_of(kind: str, path: Path, members: dict[str, bytes] = MEMBERS) -> Path:
    if kind.startswith("zip"):
        return make_zip(path, members, compression=zipfile.ZIP_DEFLATED if kind == "zip" else zipfile.ZIP_STORED)
    return make_tar(path, members, kind)


ARCHIVES = ["w", "w:gz", "w:bz2", "w:xz", "zip", "zip-stored"]


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_give_their_members_in_any_order(tmp_path: Path, kind: str) -> None:
    archive = archive_of(kind, tmp_path / "known-by-content")
    with opened(archive, tmp_path / "scratch") as files:
        listing = files.find()
        assert files.kind == "archive"
        assert listing.paths == NATURAL
        assert listing.sizes.tolist() == [len(MEMBERS[path]) for path in NATURAL]
        assert set(listing.mtimes) == {archive.stat().st_mtime_ns} or ":" in kind
        assert len(set(listing.mtimes)) == 1
        for path in [*reversed(NATURAL), NATURAL[0]]:
            assert files.fetch(path, 10_000) == Fetched(MEMBERS[path], len(MEMBERS[path]))
            assert files.local(path) is None
        assert files.fetch("nowhere", 10).status == Status.VANISHED
        assert files.find(include=["b/"], exclude=["10*"]).paths == ["b/2.png", "b/c d/1.png"]
    assert outcome(files.fetch(NATURAL[1], 10_000)) == (None, Status.UNREADABLE)
    files.close()


@pytest.mark.parametrize("kind", ARCHIVES)
def test_side_files_of_an_archive_are_counted(tmp_path: Path, kind: str) -> None:
    names = ["1.png", "a/.2.png", "Thumbs.db", "__MACOSX/a/._1.png", "notes.txt"]
    listing = found(archive_of(kind, tmp_path / "a", dict.fromkeys(names, b"x")), tmp_path / "scratch")
    assert listing.paths == ["1.png"]
    assert listing.side_files == 4


@pytest.mark.parametrize("kind", ["w", "zip"])
def test_many_threads_read_an_archive_at_once(tmp_path: Path, kind: str) -> None:
    members = {f"{number}.png": bytes([number]) * (1 + 1000 * number) for number in range(50)}
    with opened(archive_of(kind, tmp_path / "a", members)) as files, ThreadPoolExecutor(8) as pool:
        names = list(members) * 20
        assert all(
            fetched.data == members[name]
            for name, fetched in zip(names, pool.map(lambda name: files.fetch(name, MEGABYTE), names), strict=True)
        )


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_empty_archive_holds_nothing(tmp_path: Path, kind: str) -> None:
    name = "a.zip" if kind.startswith("zip") else "a.tar"
    assert found(archive_of(kind, tmp_path / name, {}), tmp_path / "scratch").paths == []


def test_names_in_tars_survive(tmp_path: Path) -> None:
    names = [*STRANGE, "./dot//slash.png", "/absolute.png", "../up.png", "long/" * 60 + "x.png"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        archive = make_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"), format=form, errors="surrogateescape")
        with opened(archive) as files:
            paths = files.find(include=["*.png"]).paths
            wanted = [*STRANGE, "dot/slash.png", "absolute.png", "up.png", "long/" * 60 + "x.png"]
            assert sorted(paths) == sorted(wanted)
            assert all(files.fetch(path, 9).data == b"x" for path in paths)


def test_names_in_zips_survive(tmp_path: Path) -> None:
    # Written in UTF-8 and in Latin-1 without the flag that says so, as several systems do.
    assert found(make_zip(tmp_path / "flagged.zip", {"é.png": b""})).paths == ["é.png"]
    for name in (b"\xc3\xa9.png", b"\xe9.png"):
        archive = make_zip(tmp_path / "a.zip", {"x" * len(name): b"data"})
        archive.write_bytes(archive.read_bytes().replace(b"x" * len(name), name))
        with opened(archive) as files:
            assert files.find().paths == [os.fsdecode(name)]
            assert files.fetch(os.fsdecode(name), 9).data == b"data"


def test_of_a_name_in_an_archive_twice_the_last_counts(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", [tar_member("a.png", b"1"), tar_member("./a.png", b"22")])
    archive = make_zip(tmp_path / "a.zip", {"a.png": b"1", "b.png": b"22"})
    archive.write_bytes(archive.read_bytes().replace(b"b.png", b"a.png"))
    for archive in (tar, tmp_path / "a.zip"):
        with opened(archive) as files:
            listing = files.find()
            assert (listing.paths, listing.repeated) == (["a.png"], 1)
            assert files.fetch("a.png", 9).data == b"22"


def test_a_file_in_place_of_a_link_in_a_tar_is_the_file(tmp_path: Path) -> None:
    link = tar_member("a.png", type=tarfile.SYMTYPE, linkname="b.png")
    with opened(make_tar(tmp_path / "a.tar", [link, tar_member("b.png", b"b"), tar_member("a.png", b"a")])) as files:
        assert files.find().repeated == 1
        assert files.fetch("a.png", 9).data == b"a"


def test_links_in_a_tar_lead_to_its_members(tmp_path: Path) -> None:
    link, symlink = tarfile.LNKTYPE, tarfile.SYMTYPE
    members = [
        tar_member("a/early.png", type=symlink, linkname="../b/1.png"),
        tar_member("a", type=tarfile.DIRTYPE),
        tar_member("b/1.png", b"data"),
        tar_member("c/hard.png", type=link, linkname="./b/1.png"),
        tar_member("c/dangling.png", type=symlink, linkname="nowhere"),
        tar_member("c/out.png", type=symlink, linkname="../../../etc/passwd"),
        tar_member("c/absolute.png", type=symlink, linkname="/b/1.png"),
        tar_member("c/itself.png", type=symlink, linkname="itself.png"),
        tar_member("pipe.png", type=tarfile.FIFOTYPE),
        tar_member("device.png", type=tarfile.CHRTYPE),
    ]
    with opened(make_tar(tmp_path / "a.tar", members)) as files:
        listing = files.find()
        assert len(listing.paths) == 9
        for path in listing.paths:
            good = path in ("a/early.png", "b/1.png", "c/hard.png")
            assert outcome(files.fetch(path, 9)) == ((b"data", None) if good else (None, Status.UNREADABLE)), path


def test_members_of_a_zip_that_cannot_be_read_are_rows(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("good.png", PNG, zipfile.ZIP_DEFLATED)
        made.writestr("bzip2.png", PNG, zipfile.ZIP_BZIP2)
        made.writestr("lzma.png", PNG, zipfile.ZIP_LZMA)
        made.writestr("encrypted.png", PNG)
        made.writestr("crc.png", b"damage here")
        made.writestr("short.png", b"S" * 1000, zipfile.ZIP_DEFLATED)
        made.writestr("bits.png", PNG * 50, zipfile.ZIP_DEFLATED)
        made.writestr("header.png", b"x")
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        made.writestr(link, "good.png")
    with zipfile.ZipFile(archive) as made:
        offsets = {info.filename: info.header_offset for info in made.infolist()}
    data = bytearray(archive.read_bytes().replace(b"damage here", b"damage there"[:11]))
    central = data.rindex(b"PK\1\2", 0, data.rindex(b"encrypted.png"))
    data[central + 8] |= 1
    central = data.rindex(b"PK\1\2", 0, data.rindex(b"short.png"))
    data[central + 24 : central + 28] = (1001).to_bytes(4, "little")
    data[offsets["bits.png"] + 60 : offsets["bits.png"] + 80] = b"\xff" * 20
    data[offsets["header.png"]] = 0
    archive.write_bytes(data)
    with opened(archive) as files:
        outcomes = {path: outcome(files.fetch(path, MEGABYTE)) for path in files.find().paths}
        assert "encrypted" in files.fetch("encrypted.png", MEGABYTE).reason
    unreadable, truncated = (None, Status.UNREADABLE), (None, Status.TRUNCATED)
    assert outcomes == {
        "good.png": (PNG, None),
        "bzip2.png": unreadable,
        "lzma.png": unreadable,
        "encrypted.png": unreadable,
        "link.png": unreadable,
        "crc.png": truncated,
        "short.png": truncated,
        "bits.png": truncated,
        "header.png": truncated,
    }


def test_bombs_in_archives_stay_packed(tmp_path: Path) -> None:
    small = make_zip(tmp_path / "lies.zip", {"a.png": bytes(100 * MEGABYTE)}, compression=zipfile.ZIP_DEFLATED)
    data = bytearray(small.read_bytes())
    central = data.rindex(b"PK\1\2")
    data[central + 24 : central + 28] = (1000).to_bytes(4, "little")
    small.write_bytes(data)
    tracemalloc.start()
    with opened(small) as files:
        assert outcome(files.fetch("a.png", MEGABYTE)) == (None, Status.TRUNCATED)
    for kind in ("w", "zip"):
        with opened(archive_of(kind, tmp_path / kind, {"a.png": bytes(2 * MEGABYTE)})) as files:
            assert files.fetch("a.png", MEGABYTE) == Fetched(
                None, 2 * MEGABYTE, Status.TOO_LARGE, f"{2 * MEGABYTE} bytes, allowed: {MEGABYTE}"
            )
    # A header that announces gigabytes of a name: the file has them, as a hole.
    announced = tar_member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=3 * 2**30)[0]
    with (tmp_path / "long.tar").open("wb") as file:
        file.write(announced.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 * 2**30 + 10_240)
    with pytest.raises(NightlyError, match="more bytes than any honest archive has"):
        found(tmp_path / "long.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * MEGABYTE


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_a_truncated_archive_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    archive = archive_of(kind, tmp_path / "a", {f"{number}.png": rng.bytes(3000) for number in range(9)})
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(NightlyError, match="damaged, truncated, or no tar or zip"):
        open_input(str(archive), tmp_path / "scratch")
    assert not list((tmp_path / "scratch").glob("*")) or kind.startswith("w:")


def test_damage_between_members_is_no_silent_end(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {f"{number}.png": b"x" for number in range(5)})
    data = bytearray(archive.read_bytes())
    data[2 * 1024 + 5] ^= 1  # in the third header
    archive.write_bytes(data)
    with pytest.raises(NightlyError, match="bad checksum"):
        found(archive)
    one, two = (make_tar(tmp_path / f"{name}.tar", {name: b"x"}).read_bytes() for name in "ab")
    archive.write_bytes(one + two)
    with pytest.raises(NightlyError, match="two archives joined"):
        found(archive)
    archive.write_bytes(one + bytes(50_000))
    assert found(archive).paths == ["a"]


@pytest.mark.parametrize("name", ["a.tar", "a.ZIP", "a.tar.gz", "a.tgz", "a.rar", "a.tar.zst"])
@pytest.mark.parametrize("data", [b"", b"Rar!\x1a\x07\x01 no tar or zip", bytes(range(256)) * 9])
def test_what_promises_an_archive_and_is_none_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(NightlyError, match="damaged, truncated, or no tar or zip"):
        open_input(str(write(tmp_path, name, data=data) / name), tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.zip", "a.tar", "a"])
def test_an_image_is_no_archive_whatever_its_name(tmp_path: Path, name: str) -> None:
    with opened(write(tmp_path, name, data=PNG) / name) as files:
        assert files.kind == "file"
        assert files.fetch(name, MEGABYTE).data == PNG


def test_a_tar_that_shrinks_while_it_is_read_gives_truncated_members(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {"a.png": b"a" * 1000, "b.png": b"b" * 1000})
    with opened(archive) as files:
        with archive.open("r+b") as file:
            file.truncate(2500)
        assert files.fetch("a.png", 9999).data == b"a" * 1000
        assert outcome(files.fetch("b.png", 9999)) == (None, Status.TRUNCATED)


def test_a_compressed_tar_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, scratch = archive_of("w:xz", tmp_path / "a.tar.xz"), tmp_path / "scratch"
    with opened(archive, scratch) as files:
        first = files.find()
    (unpacked,) = scratch.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tasks.members, "publish_file", lambda _: pytest.fail("unpacked again"))
        assert found(archive, scratch).paths == first.paths
    archive_of("w:xz", archive, {"other.png": b"x"})
    assert found(archive, scratch).paths == ["other.png"]
    assert len(list(scratch.iterdir())) == 2
    assert unpacked.is_file()


def test_a_full_disk_while_unpacking_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archive_of("w:gz", tmp_path / "a.tar.gz")

    @contextlib.contextmanager
    def full(_: Path) -> Iterator[Path]:
        yield Path("/dev/full")

    monkeypatch.setattr(tasks.members, "publish_file", full)
    with pytest.raises(OSError, match="No space left"):
        open_input(str(archive), tmp_path / "scratch")
    monkeypatch.undo()
    monkeypatch.setattr(tasks.members, "MAX_TOTAL_BYTES", 5000)
    with pytest.raises(NightlyError, match="unpacks to more than 5,000 bytes"):
        open_input(str(archive), tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    monkeypatch.setattr(tasks.members, "MAX_MEMBERS", 3)
    with pytest.raises(NightlyError, match="more than 3 members"):
        open_input(str(archive_of("zip", tmp_path / "a.zip")), tmp_path / "scratch")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["w", "zip"]), st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), max_size=4))
def test_a_damaged_archive_is_refused_or_gives_true_or_no_bytes(
    tmp_path_factory: pytest.TempPathFactory, kind: str, damage: list[tuple[int, int]]
) -> None:
    members = {f"{number}.png": bytes([number]) * 100 for number in range(4)}
    archive = archive_of(kind, tmp_path_factory.getbasetemp() / "damaged.zip", members)
    data = bytearray(archive.read_bytes())
    for place, change in damage:
        data[place % len(data)] ^= change
    archive.write_bytes(data)
    with contextlib.suppress(NightlyError), opened(archive) as files:
        if files.kind == "archive":
            for path in files.find().paths:
                bytes_read, _ = outcome(files.fetch(path, 10_000))
                # A tar has no checksum over its members.
                assert kind == "w" or bytes_read is None or bytes_read in members.values()


# Remote stores


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    monkeypatch.setattr(tasks.objects, "RETRY_SECONDS", (0, 0))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


class Troubled(MemoryFileSystem):
    """A store with a network: fails ``failures`` times at each object, and always at one called 'broken'."""

    protocol = "troubled"
    cachable = False
    failures = 0
    error: type[Exception] = ConnectionResetError
    asked: dict[str, int]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("troubled://", "memory://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        Troubled.asked[path] = Troubled.asked.get(path, 0) + 1
        if "broken" in path or Troubled.asked[path] <= self.failures:
            raise self.error("line\nlost – again")
        if "secret" in path:
            raise PermissionError(13, "Access Denied")
        data = super().cat_file(path)
        if end is not None and not data:
            raise OSError(22, "The requested range is not satisfiable")  # as S3 does
        return data[start:end]

    def find(self, path: str, **options: object) -> object:
        if "unlistable" in path:
            raise self.error("no route\nto host")
        found = super().find(path, **options)
        times = {"created": None, "LastModified": None}
        times_of_full = {"LastModified": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)}
        return {
            key: {**facts, "size": None, **times, **(times_of_full if "full" in key else {})}
            for key, facts in found.items()
        }


@pytest.fixture
def troubled(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> type[Troubled]:
    fsspec.register_implementation("troubled", Troubled, clobber=True)
    monkeypatch.setattr(Troubled, "asked", {}, raising=False)
    return Troubled


def test_a_remote_folder_is_like_a_local_one(memory: MemoryFileSystem) -> None:
    for name in ("b/10.png", "b/2.png", "été 🐈\n.png", ".hidden/3.png", "notes.txt"):
        memory.pipe(f"/bucket/set/{name}", b"12345")
    memory.pipe("/bucket/other.png", b"")
    with opened("memory://bucket/set") as files:
        listing = files.find()
        assert (files.kind, files.source) == ("remote", "memory://bucket/set")
        assert listing.paths == ["b/2.png", "b/10.png", "été 🐈\n.png"]
        assert listing.sizes.tolist() == [5, 5, 5]
        assert abs(listing.mtimes[0] / 1e9 - time.time()) < 60
        assert listing.side_files == 2
        assert files.find(exclude=["b/"]).excluded == 2
        assert all(files.fetch(path, 5) == Fetched(b"12345", 5) for path in listing.paths)
        assert files.fetch("b/2.png", 4) == Fetched(None, 5, Status.TOO_LARGE, "5 bytes, allowed: 4")
        assert files.local("b/2.png") is None
        memory.rm("/bucket/set/b/2.png")
        assert outcome(files.fetch("b/2.png", 9)) == (None, Status.VANISHED)
        files.close()
    assert found("memory://bucket/set/").paths == listing.paths[1:]
    assert found("memory://").paths == ["bucket/other.png", "bucket/set/b/10.png", "bucket/set/été 🐈\n.png"]
    with opened("memory://bucket/set/notes.txt") as files:
        assert files.find().paths == ["notes.txt"]
        assert files.fetch("notes.txt", 9).data == b"12345"


def test_patterns_work_on_remote_stores(memory: MemoryFileSystem) -> None:
    for name in PATHS:
        memory.pipe(f"/bucket/{name}", b"x")
    with opened("memory://bucket/**/*.jpg") as files:
        assert files.find().paths == ["1.jpg", "a/1.jpg", "a/b/1.jpg", "b/a/1.jpg"]
        assert files.fetch("a/b/1.jpg", 9).data == b"x"
    assert found("memory://bucket/a/*").paths == ["1.jpg"]
    memory.pipe("/bucket/[1]/x.jpg", b"x")
    assert found("memory://bucket/[1]").paths == ["x.jpg"]


def test_empty_objects_and_folder_marks(troubled: type[Troubled], memory: MemoryFileSystem) -> None:
    memory.pipe("/bucket/empty.png", b"")
    memory.pipe("/bucket/full.png", b"x")
    memory.store["/bucket/folder/"] = memory.store["/bucket/empty.png"]
    with opened("troubled://bucket") as files:
        listing = files.find()
        assert listing.paths == ["empty.png", "full.png"]
        assert listing.sizes.tolist() == [-1, -1]
        assert listing.mtimes.tolist() == [0, 1_577_836_800 * 10**9]
        assert files.fetch("empty.png", 9) == Fetched(b"", 0)
        assert files.fetch("full.png", 9) == Fetched(b"x", 1)
        assert Troubled.asked["/bucket/full.png"] == 1


class NotEvenAnOSError(Exception):
    """What aiohttp raises when a connection breaks, for one."""


@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, NotEvenAnOSError])
def test_a_network_that_fails_is_asked_again(
    troubled: type[Troubled], memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    for name in ("a.png", "broken.png", "secret.png"):
        memory.pipe(f"/bucket/{name}", b"x")
    memory.pipe("/unlistable/a.png", b"x")
    monkeypatch.setattr(Troubled, "failures", 2)
    monkeypatch.setattr(Troubled, "error", error)
    with opened("troubled://bucket") as files:
        assert files.fetch("a.png", 9) == Fetched(b"x", 1)
        assert Troubled.asked["/bucket/a.png"] == 3
        assert files.fetch("broken.png", 9) == Fetched(None, 0, Status.UNREADABLE, "line lost \\u2013 again")
        assert Troubled.asked["/bucket/broken.png"] == 3
        monkeypatch.setattr(Troubled, "failures", 0)
        assert files.fetch("secret.png", 9) == Fetched(None, 0, Status.UNREADABLE, "Access Denied")
        assert Troubled.asked["/bucket/secret.png"] == 1
        monkeypatch.setattr(Troubled, "size", lambda *_: pytest.fail("a broken network is asked for a size"))
        assert files.fetch("broken.png", 9).status == Status.UNREADABLE
    with (
        opened("troubled://unlistable") as files,
        pytest.raises(NightlyError, match="cannot be listed: no route to host"),
    ):
        files.find()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nowhere/at/all", "there is nothing at 'memory://nowhere/at/all'"),
        ("memory://nowhere/*.jpg", "there is nothing at"),
        ("nonsense://bucket", "nonsense"),
        ("file:///nowhere/at/all", "there is nothing at"),
    ],
)
def test_an_address_without_anything_is_refused(memory: MemoryFileSystem, address: str, message: str) -> None:
    with pytest.raises(NightlyError, match=message):
        open_input(address, Path("scratch"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(NightlyError, match=r"resnet-nightly\[s3\]"):
        open_input("s3://bucket/prefix", Path("scratch"))


def test_a_file_address_is_a_local_path(tmp_path: Path) -> None:
    write(tmp_path, "photos/1.jpg")
    for address, kind in ((f"file://{tmp_path}/photos", "directory"), (f"file://{tmp_path}/photos/*.jpg", "glob")):
        with opened(address) as files:
            assert (files.kind, files.source) == (kind, address)
            assert files.find().paths == ["1.jpg"]
            assert files.local("1.jpg") == tmp_path / "photos/1.jpg"


# Size


@pytest.mark.slow
def test_a_hundred_thousand_files_are_listed_quickly_in_little_memory(tmp_path: Path) -> None:
    for number in range(100_000):
        if number % 10_000 == 0:
            folder = tmp_path / f"class-{number}"
            folder.mkdir()
        os.close(os.open(f"{folder}/image_{number:06d}.jpg", os.O_CREAT | os.O_WRONLY))
    begin = time.monotonic()
    listing = found(tmp_path)
    seconds = time.monotonic() - begin
    assert len(listing.paths) == 100_000
    assert listing.paths == natsorted(listing.paths)
    assert seconds < 20
    tracemalloc.start()
    found(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6
