"""One folder with everything that goes wrong in real ones: each file gets its row, and none shifts another's."""

import csv
import ctypes
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from natsort import natsorted
from PIL import Image

from tasks.bundle import load_bundle
from tasks.images import Status, encode_png
from tasks.inputs import LocalFiles
from tasks.outcome import PredictParams, PredictSummary
from tasks.predict import predict
from tasks.rows import printable
from tasks.sources import is_side_file
from tests.conftest import colored_image
from tests.hostile import encoded, exif_block, hostile_images, photo
from tests.test_images import STORED

ROOT = Path(__file__).resolve().parent.parent
# Longer means that a pipe was waited for. Then only the end of the process helps: no exception ends the thread.
pytestmark = pytest.mark.timeout(120, method="thread")

#: Which engine is the fastest depends on the number of cores, which one test pretends.
ENGINE = {"engine": "openvino", "precision": "float32"}
JPEG = encoded(photo(200, 150), "JPEG")
CUTS = [*range(20), *range(20, len(JPEG), 97), *range(len(JPEG) - 9, len(JPEG))]
NAMES = ["emoji 🐈‍⬛.png", "line\nbreak.png", "tab\t\"quote',.png", "Ünïcode.png", "-rf", "trailing .png ", "%s{}.png"]
NOT_UTF8 = os.fsdecode(b"bytes-\xff\xfe.png")


@dataclass
class Folder:
    """What was made, and what must be said of it.

    Attributes:
        statuses: of every file that is no side file, by its path as the system has it.
        victim: a good file that is deleted while the prediction runs.
    """

    path: Path
    statuses: dict[str, Status]
    side_files: int
    victim: str

    @property
    def good(self) -> list[str]:
        return [path for path, status in self.statuses.items() if status == Status.OK]


@pytest.fixture(scope="module")
def folder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """The hostile folder."""
    path = tmp_path_factory.mktemp("hostile") / "folder"
    statuses: dict[str, Status] = {}
    side_files = 0

    def put(name: str, data: bytes, status: Status = Status.OK) -> Path:
        nonlocal side_files
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if is_side_file(name):
            side_files += 1
        else:
            statuses[name] = status
        return file

    for name, (data, status) in hostile_images().items():
        put(f"kinds/{name}", data, status)
    for orientation, stored in STORED.items():
        picture = Image.fromarray(np.ascontiguousarray(stored(np.asarray(photo()))))
        put(f"turned/{orientation}.png", encoded(picture, "PNG", exif=exif_block(orientation)))
        put(f"turned/{orientation}.jpg", encoded(picture, "JPEG", exif=exif_block(orientation, "<")))
    for cut in CUTS:
        status = Status.EMPTY if cut == 0 else Status.NOT_AN_IMAGE if cut < 3 else Status.TRUNCATED
        put(f"cuts/{cut}.jpg", JPEG[:cut], status)
    put(f"cuts/{len(JPEG)}.jpg", JPEG)
    for number, name in enumerate([*NAMES, NOT_UTF8, "9.png", "10.png", "deep/" + "er/" * 40 + "9.png"]):
        put(f"names/{name}", encode_png(colored_image("red", 500 + number)))
    put("equal/a/same.png", encode_png(colored_image("red", 600)))
    put("equal/b/same.png", encode_png(colored_image("blue", 601)))
    with put("odd/too-many-bytes.png", encode_png(colored_image("red", 602)), Status.TOO_LARGE).open("ab") as file:
        file.truncate(load_bundle(exported).decode.max_bytes + 1)
    (path / "odd/loop").symlink_to(path)
    (path / "odd/elsewhere").symlink_to("../names")
    for name, target, status in [
        ("itself.png", "itself.png", Status.UNREADABLE),
        ("dangling.png", "nowhere.png", Status.VANISHED),
        ("link.png", "../equal/a/same.png", Status.OK),
        ("device.png", "/dev/zero", Status.UNREADABLE),
        ("pipe-by-link.png", "pipe.png", Status.UNREADABLE),
    ]:
        (path / "odd" / name).symlink_to(target)
        statuses[f"odd/{name}"] = status
    os.mkfifo(path / "odd/pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path / "odd/socket.png"))
    put("odd/secret.png", encode_png(colored_image("red", 603)), Status.UNREADABLE).chmod(0)
    put("odd/locked/inside.png", encode_png(colored_image("red", 604))).parent.chmod(0)
    del statuses["odd/locked/inside.png"]
    statuses |= dict.fromkeys(["odd/pipe.png", "odd/socket.png", "odd/locked"], Status.UNREADABLE)
    put("zz/last.png", encode_png(colored_image("green", 605)))
    yield Folder(path, statuses, side_files, "zz/last.png")
    (path / "odd/locked").chmod(0o700)


@contextmanager
def without_superpowers() -> Iterator[None]:
    """Let permissions count for this thread and those it starts, even if it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then the same for numbers from 32 on
    assert libc.capget(header, before) == 0
    now = (ctypes.c_uint32 * 6)(*before)
    now[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, now) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def run(
    source: Path, model: Path, out: Path, victim: Path | None = None, **params: object
) -> tuple[PredictSummary, pa.Table]:
    """Predict as nobody special, delete ``victim`` once the first file is fetched, and bring it back."""
    fetch = LocalFiles.fetch
    kept = victim.read_bytes() if victim else b""

    def fetch_and_delete(self: LocalFiles, path: str, max_bytes: int):
        if victim:
            victim.unlink(missing_ok=True)
        return fetch(self, path, max_bytes)

    with pytest.MonkeyPatch.context() as patch, without_superpowers():
        patch.setattr(LocalFiles, "fetch", fetch_and_delete)
        try:
            summary = predict(source, out, model, PredictParams(**params))
        finally:
            if victim:
                victim.write_bytes(kept)
    return summary, pq.read_table(out / "predictions.parquet")


def copy_good(folder: Folder, destination: Path) -> None:
    """Make a folder of nothing but the good files."""
    for path in folder.good:
        (destination / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.path / path, destination / path)


@pytest.fixture(scope="module")
def clean(folder: Folder, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The rows of a folder with nothing but the good files, the victim among them."""
    tmp = tmp_path_factory.mktemp("clean")
    copy_good(folder, tmp / "good")
    summary, table = run(tmp / "good", exported, tmp / "out", **ENGINE)
    assert summary.counts.statuses == {"ok": len(folder.good)}
    return table


@pytest.fixture(scope="module")
def hostile(folder: Folder, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PredictSummary, Path]:
    """The summary and the result of the hostile folder, whose victim is deleted in mid-run."""
    out = tmp_path_factory.mktemp("result") / "out"
    summary, _ = run(folder.path, exported, out, folder.path / folder.victim, formats=["csv", "jsonl"], **ENGINE)
    return summary, out


def rows_of(out: Path) -> pa.Table:
    return pq.read_table(out / "predictions.parquet")


def good_rows(table: pa.Table) -> pa.Table:
    return table.filter(pa.compute.equal(table["status"], "ok")).combine_chunks()


def all_but(table: pa.Table, path: str) -> pa.Table:
    return table.filter(pa.compute.not_equal(table["path"], path)).combine_chunks()


def test_every_file_has_one_row_with_its_status_in_natural_order(folder: Folder, hostile) -> None:
    summary, out = hostile
    table = rows_of(out)
    expected = folder.statuses | {folder.victim: Status.VANISHED}
    assert table["path"].to_pylist() == [printable(path) for path in natsorted(sorted(expected))]
    found = dict(zip(table["path"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert found == {printable(path): str(status) for path, status in expected.items()}
    assert summary.counts.files == len(expected)
    assert summary.counts.statuses == {status: list(found.values()).count(status) for status in set(found.values())}
    assert set(found.values()) == {str(status) for status in Status}, "each status is there"
    assert summary.left_out == {"hidden and side files": folder.side_files}
    assert folder.side_files >= 3


def test_bad_rows_say_why_and_good_ones_are_complete(hostile) -> None:
    for row in rows_of(hostile[1]).to_pylist():
        answer = [row[name] for name in ("label", "confidence", "labels", "probabilities")]
        if row["status"] == "ok":
            assert row["reason"] == ""
            assert None not in answer
            assert row["width"] > 0 < row["height"]
        else:
            assert row["reason"], row["path"]
            assert row["reason"].isascii()
            assert row["reason"].isprintable()
            assert answer == [None] * 4
            assert row["accepted"] is False


def test_reasons_are_those_that_help(hostile) -> None:
    reasons = {row["path"]: row["reason"] for row in rows_of(hostile[1]).to_pylist()}
    for path, words in {
        "odd/secret.png": "Permission denied",
        "odd/locked": "Permission denied",
        "odd/itself.png": "Too many levels of symbolic links",
        "odd/pipe.png": "not a regular file",
        "odd/dangling.png": "the file is gone",
        "zz/last.png": "the file is gone",
        "odd/too-many-bytes.png": "bytes, allowed: ",
        "kinds/bomb.png": "30000 x 30000 pixels",
        "kinds/phone.heic": "HEIC",
        "kinds/text.jpg": "no image format",
    }.items():
        assert words in reasons[path], path


def test_good_rows_are_those_of_a_folder_without_bad_files(folder: Folder, hostile, clean: pa.Table) -> None:
    assert good_rows(rows_of(hostile[1])).equals(all_but(clean, folder.victim))


@pytest.mark.parametrize(
    ("params", "threads"), [({"shard_files": 1}, 3), ({"shard_files": 7, "batch_size": 3}, 9), ({"batch_size": 200}, 1)]
)
def test_rows_depend_neither_on_shards_nor_batches_nor_threads(
    folder: Folder, exported: Path, hostile, tmp_path: Path, monkeypatch, params: dict, threads: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    _, table = run(folder.path, exported, tmp_path / "out", folder.path / folder.victim, **ENGINE, **params)
    assert table.combine_chunks().equals(rows_of(hostile[1]).combine_chunks())


@pytest.mark.parametrize("params", [{"engine": "keras", "batch_size": 8}, {}])
def test_bad_files_change_no_good_row_with_other_engines_either(
    folder: Folder, exported: Path, tmp_path: Path, params: dict
) -> None:
    copy_good(folder, tmp_path / "good")
    _, dirty = run(folder.path, exported, tmp_path / "dirty", **params)
    _, clean = run(tmp_path / "good", exported, tmp_path / "clean", **params)
    assert good_rows(dirty).equals(clean.combine_chunks())


def test_the_eight_orientations_are_one_picture(hostile) -> None:
    rows = [row for row in rows_of(hostile[1]).to_pylist() if row["path"].startswith("turned/")]
    assert len(rows) == 16
    assert {(row["width"], row["height"]) for row in rows} == {photo().size}
    lossless = [row["probabilities"] for row in rows if row["path"].endswith(".png")]
    assert lossless == [lossless[0]] * 8
    assert {row["label"] for row in rows} == {rows[0]["label"]}


def test_a_label_goes_to_the_file_it_was_found_for(hostile) -> None:
    rows = {row["path"]: row for row in rows_of(hostile[1]).to_pylist()}
    assert (rows["equal/a/same.png"]["label"], rows["equal/b/same.png"]["label"]) == ("red", "blue")
    for name in ("probabilities", "width", "height", "bytes"):
        assert rows["odd/link.png"][name] == rows["equal/a/same.png"][name]
    assert {row["label"] for path, row in rows.items() if path.startswith("names/")} == {"red"}
    assert rows["kinds/rgb.jpg"]["probabilities"] == rows["kinds/no-extension"]["probabilities"]


def test_csv_and_json_lines_hold_every_name_as_parquet_does(hostile) -> None:
    table = rows_of(hostile[1])
    with (hostile[1] / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("path", "status", "reason"):
        assert [row[name] for row in rows] == table[name].to_pylist()
    lines = (hostile[1] / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == table["path"].to_pylist()
    assert {f"names/{name}" for name in NAMES} <= set(table["path"].to_pylist())
    assert r"names/bytes-\xff\xfe.png" in table["path"].to_pylist()


def test_a_list_of_paths_means_every_file_it_names(folder: Folder, exported: Path, tmp_path: Path, hostile) -> None:
    named = ["kinds/jpeg-inside.txt", "kinds/.DS_Store", "kinds/page.html", "odd/pipe.png", "never/was.png", "odd"]
    listed = [*folder.statuses, *named[:3], *named[4:]]
    (tmp_path / "all.lst").write_bytes(b"".join(os.fsencode(folder.path / path) + b"\0" for path in listed))
    _, table = run(tmp_path / "all.lst", exported, tmp_path / "out")
    found = dict(zip(table["path"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert [found[str(folder.path / path)] for path in named] == [
        *("ok", "not_an_image", "not_an_image", "unreadable", "vanished", "unreadable")
    ]
    assert len(table) == len(listed)
    for path, status in folder.statuses.items():
        assert found[printable(str(folder.path / path))] == status, path


def test_a_stream_of_bad_files_between_good_ones_shifts_none(exported: Path, tmp_path: Path) -> None:
    """Runs of bad files longer than all queues, at the beginning, in the middle and at the end."""
    source = tmp_path / "source"
    source.mkdir()
    labels, number = {}, itertools.count()
    for bad, good in ((300, 1), (150, 9), (1, 17), (40, 0)):
        for _ in range(bad):
            (source / f"{next(number)}.png").write_bytes(b"")
        for _ in range(good):
            name = f"{next(number)}.png"
            labels[name] = ("red", "green", "blue")[len(labels) % 3]
            (source / name).write_bytes(encode_png(colored_image(labels[name], 700 + len(labels))))
    _, table = run(source, exported, tmp_path / "out", shard_files=64)
    found = dict(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert list(found) == [f"{index}.png" for index in range(next(number))]
    assert {path: label for path, label in found.items() if label} == labels


@pytest.mark.slow
def test_two_thousand_mutants_do_no_harm_to_the_decoder(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/fuzz_decoder.py", "--images", "2000", "--seed", "7", "--save", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["images"] == sum(facts["statuses"].values()) == 2000
    assert facts["statuses"]["ok"] > 100 < facts["statuses"]["truncated"]
