"""Classified images in a folder for each class: where each goes, and that none is lost, doubled or half."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import NightlyError
from tasks.inputs import open_input
from tasks.sorting import SortCounts, place_for, sort_into

IMAGES = {"1.png": b"one", "a/1.png": b"two", "a/b/été 🐈\n.png": b"three", os.fsdecode(b"\xff.png"): b"four"}
ROWS = [
    ("1.png", "cat", True, "ok"),
    ("a/1.png", "cat", False, "ok"),
    ("a/b/été 🐈\n.png", "dog", True, "ok"),
    (os.fsdecode(b"\xff.png"), "cat", True, "ok"),
    ("broken.png", None, False, "truncated"),
]
PLACES = {
    "cat/1.png": b"one",
    "_unsure/cat/a/1.png": b"two",
    "dog/a/b/été 🐈\n.png": b"three",
    os.fsdecode(b"cat/\xff.png"): b"four",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, data in IMAGES.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "photos"


def sort(source: object, destination: Path, rows: object = ROWS, mode: str = "link", max_bytes: int = 99) -> SortCounts:
    with contextlib.closing(open_input(str(source), destination.parent / "scratch")) as files:
        return sort_into(destination, rows, files, mode, max_bytes)


def contents(folder: Path) -> dict[str, bytes]:
    return {os.path.relpath(path, folder): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("mode", ["link", "copy"])
def test_images_go_into_their_classes_folder_and_a_rerun_leaves_them(photos: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "deep" / "sorted"
    assert sort(photos, out, mode=mode) == SortCounts(placed=4, unsure=1, failed=1)
    assert contents(out) == PLACES
    assert {path.is_symlink() for path in out.rglob("*") if not path.is_dir()} == {mode == "link"}
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
    assert sort(photos, out, mode=mode) == SortCounts(present=4, unsure=1, failed=1)
    (out / "cat" / "1.png").unlink()
    assert sort(photos, out, mode=mode) == SortCounts(placed=1, present=3, unsure=1, failed=1)
    assert contents(out) == PLACES
    assert (out / "dog/a/b/été 🐈\n.png").lstat().st_mtime_ns == before[out / "dog/a/b/été 🐈\n.png"]


def test_links_are_absolute(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sort("photos", Path("sorted"))
    assert os.readlink("sorted/cat/1.png") == str(photos / "1.png")
    (tmp_path / "list.txt").write_text(f"photos/1.png\n{photos}/a/1.png")
    rows = [("photos/1.png", "cat", True, "ok"), (f"{photos}/a/1.png", "cat", True, "ok")]
    sort("list.txt", Path("listed"), rows)
    assert contents(Path("listed")) == {"cat/photos/1.png": b"one", f"cat{photos}/a/1.png": b"two"}


def test_copies_come_out_of_archives_and_remote_stores_and_links_do_not(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in list(IMAGES.items())[:3]:
            archive.writestr(name, data)
            files.pipe(f"/sorting/{name}", data)
    for source in (tmp_path / "a.zip", "memory://sorting"):
        out = tmp_path / f"sorted-{len(str(source))}"
        with pytest.raises(NightlyError, match=r"cannot link .* archive or remote: use --copy"):
            sort(source, out, ROWS[:3])
        assert not out.exists()
        assert sort(source, out, ROWS[:3], mode="copy").placed == 3
        assert contents(out) == {place: data for place, data in PLACES.items() if data != b"four"}
    files.rm("/sorting", recursive=True)


def test_what_cannot_be_read_any_more_is_counted(photos: Path, tmp_path: Path) -> None:
    (photos / "1.png").unlink()
    counts = sort(photos, tmp_path / "sorted", mode="copy", max_bytes=4)
    assert counts == SortCounts(placed=2, unsure=1, failed=1, gone=2)  # 'three' has five bytes
    assert sorted(contents(tmp_path / "sorted").values()) == [b"four", b"two"]


@pytest.mark.parametrize("mode", ["link", "copy"])
@pytest.mark.parametrize(
    "obstacle", ["file", "other link", "dangling link", "folder", "file for a folder", "file for all"]
)
def test_nothing_of_someone_elses_is_overwritten(photos: Path, tmp_path: Path, mode: str, obstacle: str) -> None:
    out = tmp_path / "sorted"
    place = out / "cat" / "1.png"
    place.parent.mkdir(parents=True)
    if obstacle == "file":
        place.write_bytes(b"on1")
    elif obstacle == "other link":
        (tmp_path / "same").write_bytes(b"one")
        place.symlink_to(tmp_path / "same")
    elif obstacle == "dangling link":
        place.symlink_to("nowhere")
    elif obstacle == "folder":
        place.mkdir()
    elif obstacle == "file for all":
        place.parent.rmdir()
        out.rmdir()
        out.write_bytes(b"mine")
    else:
        place.parent.rmdir()
        place.parent.write_bytes(b"mine")
    before = sorted((str(path), path.is_dir() or os.stat(path, follow_symlinks=False)) for path in out.rglob("*"))
    with pytest.raises(NightlyError, match=r"cat/1.png' cannot be made: another file stands there"):
        sort(photos, out, mode=mode)
    after = sorted((str(path), path.is_dir() or os.stat(path, follow_symlinks=False)) for path in out.rglob("*"))
    assert [path for path, _ in after] == [path for path, _ in before]


def test_a_full_disk_is_one_clear_error_and_the_rerun_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def fill(path: Path, data: bytes) -> None:
        write(path, data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "sorted"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: (fill if data == b"three" else write)(path, data))
        with pytest.raises(
            NightlyError, match=r"stopped: the disk is full .*dog/a/b/.*\\n.*: free some space"
        ) as raised:
            sort(photos, out, mode="copy")
    assert str(out) in str(raised.value)
    assert contents(out) == {place: PLACES[place] for place in ("cat/1.png", "_unsure/cat/a/1.png")}
    assert sort(photos, out, mode="copy") == SortCounts(placed=2, present=2, unsure=1, failed=1)
    assert contents(out) == PLACES
    monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Not permitted")))
    with pytest.raises(NightlyError, match="stopped: Not permitted"):
        sort(photos, tmp_path / "links")


def test_a_killed_copy_leaves_whole_files_only_and_the_rerun_goes_on(tmp_path: Path) -> None:
    photos, out, size = tmp_path / "photos", tmp_path / "sorted", 300_000
    photos.mkdir()
    for number in range(200):
        (photos / f"{number}.png").write_bytes(bytes([number]) * size)
    script = f"""if True:
        import time
        from pathlib import Path
        from tasks.inputs import open_input
        from tasks.sorting import sort_into
        rows = ((f"{{number}}.png", "cat", True, "ok") for number in range(200) if not time.sleep(0.003))
        print("begin", flush=True)
        sort_into(Path({str(out)!r}), rows, open_input({str(photos)!r}, Path()), "copy", {size})
    """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not out.is_dir() or len(list(out.rglob("*.png"))) < 20:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    there = list(out.rglob("*.png"))
    assert 20 <= len(there) < 200
    assert all(path.stat().st_size == size for path in there)
    rows = [(f"{number}.png", "cat", True, "ok") for number in range(200)]
    assert sort(photos, out, rows, "copy", size) == SortCounts(placed=200 - len(there), present=len(there))
    assert [path.name for path in out.iterdir()] == ["cat"]


ANYTHING = st.text(st.characters(exclude_categories=()) | st.sampled_from("/.\\\0%_\n"), max_size=400)


@settings(max_examples=500, deadline=None)
@given(path=ANYTHING | st.just("a" * 300), label=ANYTHING | st.just("_unsure"), accepted=st.booleans())
def test_no_path_and_no_label_leaves_the_destination(path: str, label: str, accepted: bool) -> None:
    with contextlib.suppress(UnicodeEncodeError):  # no file system gives such a name
        os.fsencode(path + label)
        place = place_for(path, label, accepted=accepted)
        assert not place.is_absolute()
        assert len(place.parts) >= 2 + (not accepted)
        assert (place.parts[0] == "_unsure") == (not accepted)
        for part in place.parts:
            assert part not in ("", ".", "..")
            assert not set(part) & {"/", "\0"}
            assert len(os.fsencode(part)) <= 255
        assert os.path.normpath(place) == str(place)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "..", "b.png", "a" * 300, "a" * 299 + "b", "_unsure"]), min_size=1, max_size=3),
        max_size=9,
    )
)
def test_different_paths_have_different_places(paths: list[list[str]]) -> None:
    names = {"/".join(parts) for parts in paths}
    assert len({place_for(name, "cat", accepted=True) for name in names}) == len(names)


def test_names_people_know_stay_as_they_are() -> None:
    assert place_for("a/b/100 %, é.JPG", "tench, Tinca tinca", accepted=True) == Path(
        "tench, Tinca tinca/a/b/100 %, é.JPG"
    )
    assert place_for("/data/1.png", "a/b", accepted=True) == Path("a%2Fb/data/1.png")
    assert place_for("../1.png", "..", accepted=False) == Path("_unsure/%2E%2E/%2E%2E/1.png")
    assert place_for("1.png", "_unsure", accepted=True) == Path("%5Funsure/1.png")
    assert place_for("x" * 300 + ".jpeg", "cat", accepted=True).suffix == ".jpeg"
