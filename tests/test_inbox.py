"""The inbox: what comes in, is quarantined or is left, and that a kill at any step loses and doubles nothing."""

import errno
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from tasks import inbox as module
from tasks.archives import read_members, write_tar
from tasks.errors import NightlyError
from tasks.files import sha256_file
from tasks.images import DecodePolicy, encode_png
from tasks.inbox import InboxParams, Intake, is_waiting, known_classes, take_in
from tasks.vetting import BEING_WRITTEN, CHANGED, NO_CLASSES_YET, NOT_PLAIN
from tests.conftest import COLORS, colored_image

POLICY = DecodePolicy(size=8)
AT_ONCE = InboxParams(settle_seconds=0)
CLASSES = list(COLORS)


def picture(color: str, seed: int) -> bytes:
    return encode_png(colored_image(color, seed))


def put(root: Path, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        path = root / "inbox" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def take(root: Path, params: InboxParams = AT_ONCE, classes: list[str] | None = CLASSES, **options) -> Intake:
    options = {"prepared": root / "prepared", "decode_policy": POLICY} | options
    return take_in(root / "inbox", root / "additions", root / "quarantine", params, classes=classes, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def archives(root: Path) -> list[Path]:
    return sorted((root / "additions").glob("*.tar"))


def members(root: Path) -> dict[str, bytes]:
    return dict(itertools.chain.from_iterable(read_members(archive) for archive in archives(root)))


def records(root: Path) -> list[dict]:
    found = sorted((root / "quarantine").glob("*.jsonl"))
    return [json.loads(line) for record in found for line in record.read_text().splitlines()]


def write_manifest(root: Path, rows: list[tuple[str, str, str, bytes]]) -> None:
    (root / "prepared").mkdir(parents=True)
    table = pd.DataFrame(rows, columns=["origin", "name", "class", "content_hash"])
    table["content_hash"] = [hashlib.sha256(data).hexdigest() for data in table.content_hash]
    table.to_parquet(root / "prepared" / "manifest.parquet")


# What comes in


def test_good_images_become_one_archive_and_leave_the_inbox(tmp_path):
    new = {f"{name}/{seed}.png": picture(name, seed) for name in ("red", "blue") for seed in range(3)}
    put(tmp_path, new)
    intake = take(tmp_path, batch="20260102-020000")
    assert intake.taken == {"red": 3, "blue": 3}
    (archive,) = archives(tmp_path)
    assert archive.name == intake.archive == f"20260102-020000-{sha256_file(archive)[:12]}.tar"
    assert intake.digest == sha256_file(archive)
    packed = members(tmp_path)
    assert sorted(packed.values()) == sorted(new.values())
    assert all(
        name.split("/")[0] == old.split("/")[0] for old, data in new.items() for name in packed if packed[name] == data
    )
    assert list(packed) == sorted(packed)
    assert files(tmp_path / "inbox") == {}
    assert sorted(os.listdir(tmp_path)) == ["additions", "inbox"]
    assert intake.sentences() == [f"Took in 6 images (blue: 3, red: 3), packed as {archive.name}."]


def test_the_same_images_give_the_same_bytes_whatever_their_times(tmp_path):
    digests = []
    for root, age in ((tmp_path / "a", 0), (tmp_path / "b", 5000)):
        put(root, {f"red/{seed}.png": picture("red", seed) for seed in range(3)})
        for path in (root / "inbox" / "red").iterdir():
            os.utime(path, (age, age))
        digests.append(take(root).digest)
    assert digests[0] == digests[1]


def test_equal_names_on_two_nights_are_two_names_in_the_archives(tmp_path):
    for seed in (1, 2):
        put(tmp_path, {"red/IMG_1.png": picture("red", seed)})
        take(tmp_path)
    assert len(archives(tmp_path)) == len(members(tmp_path)) == 2
    assert all(name.startswith("red/IMG_1-") and name.endswith(".png") for name in members(tmp_path))


def test_an_empty_inbox_changes_nothing_in_milliseconds(tmp_path):
    (tmp_path / "inbox" / "red").mkdir(parents=True)
    (tmp_path / "additions").mkdir()
    put(tmp_path, {".gitkeep": b"", "red/.DS_Store": b"x", "red/notes.txt": b"x", ".stfolder/x.png": picture("red", 1)})
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    started = time.perf_counter()
    assert not is_waiting(tmp_path / "inbox", tmp_path / "additions")
    assert take(tmp_path) == Intake()
    assert time.perf_counter() - started < 0.1
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {path: facts.st_mtime_ns for path, facts in after.items()} == {p: f.st_mtime_ns for p, f in before.items()}
    assert Intake().sentences() == ["The inbox is empty."]
    assert not is_waiting(tmp_path / "nowhere", tmp_path / "nowhere")
    put(tmp_path, {"red/1.png": b""})
    assert is_waiting(tmp_path / "inbox", tmp_path / "additions")


def test_the_report_is_json(tmp_path):
    put(tmp_path, {"red/1.png": picture("red", 1), "red/2.png": b"bad"})
    (tmp_path / "inbox" / "red" / os.fsdecode(b"\xff.png")).write_bytes(b"bad, too")
    intake = take(tmp_path)
    assert Intake(**json.loads(json.dumps(asdict(intake), ensure_ascii=False).encode())) == intake


# What is quarantined


def test_bad_files_are_quarantined_with_their_reasons_and_can_be_put_back(tmp_path):
    good = picture("red", 1)
    bad = {
        "red/cut.png": good[:-20],
        "red/text.png": b"this is no image",
        "red/empty.jpg": b"",
        "red/vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "loose.png": picture("red", 2),
        "red/deep/er.png": picture("red", 3),
        "redd/1.png": picture("red", 4),
    }
    put(tmp_path, bad | {"red/good.png": good})
    intake = take(tmp_path, batch="night")
    assert intake.taken == {"red": 1}
    assert files(tmp_path / "quarantine" / "night") == bad
    found = {line["path"]: line for line in records(tmp_path)}
    assert {path: line["status"] for path, line in found.items()} == {
        "red/cut.png": "truncated",
        "red/text.png": "not_an_image",
        "red/empty.jpg": "empty",
        "red/vector.svg": "unsupported",
        "loose.png": "no_class",
        "red/deep/er.png": "no_class",
        "redd/1.png": "unknown_class",
    }
    assert "did you mean 'red'?" in found["redd/1.png"]["reason"]
    assert all(line["sha256"] == hashlib.sha256(bad[path]).hexdigest() for path, line in found.items())
    assert intake.quarantined == dict(Counter(line["status"] for line in found.values()))
    assert intake.record == "night.jsonl"
    assert any(example.startswith("red/cut.png: PNG: ends") for example in intake.examples)
    assert files(tmp_path / "inbox") == {}


def test_a_file_over_the_policys_bytes_is_quarantined_unread(tmp_path):
    put(tmp_path, {"red/1.png": picture("red", 1)})
    intake = take(tmp_path, decode_policy=DecodePolicy(max_bytes=10))
    assert intake.quarantined == {"too_large": 1}


def test_two_batches_of_one_name_stay_apart(tmp_path):
    for text in (b"one", b"two"):
        put(tmp_path, {"red/1.png": text})
        take(tmp_path, batch="night")
    found = files(tmp_path / "quarantine")
    assert found["night/red/1.png"] == b"one"
    assert found["night-2/red/1.png"] == b"two"


# What is there already


def test_a_copy_of_an_addition_is_removed_with_a_trace(tmp_path):
    put(tmp_path, {"red/1.png": picture("red", 1)})
    archive = take(tmp_path).archive
    put(tmp_path, {"red/again.png": picture("red", 1)})
    intake = take(tmp_path, batch="next")
    assert (intake.archive, intake.known, intake.quarantined) == (None, 1, {})
    (line,) = records(tmp_path)
    assert (line["path"], line["status"]) == ("red/again.png", "known")
    assert archive in line["reason"]
    assert files(tmp_path / "inbox") == {}
    assert len(archives(tmp_path)) == 1


def test_the_manifest_saves_reading_archives_but_is_not_believed(tmp_path, monkeypatch):
    put(tmp_path, {"red/1.png": picture("red", 1)})
    first = take(tmp_path).archive
    put(tmp_path, {"red/2.png": picture("red", 2)})
    second = take(tmp_path).archive
    # It says of both images that they are in the second archive, and knows of no other in the first.
    rows = [(second, "x", "red", picture("red", seed)) for seed in (1, 2)]
    write_manifest(tmp_path, [*rows, (first, "x", "red", b"another")])
    put(tmp_path, {"red/1.png": picture("red", 1), "red/2.png": picture("red", 2)})
    read = []
    from tasks import vetting

    original = vetting.read_archive
    monkeypatch.setattr(
        vetting, "read_archive", lambda path, **limits: read.append(path.name) or original(path, **limits)
    )
    intake = take(tmp_path)
    assert read == [second]
    assert (intake.known, intake.taken) == (1, {"red": 1})


def test_a_copy_of_the_source_is_quarantined_since_the_manifest_is_no_proof(tmp_path):
    write_manifest(tmp_path, [("source", "red/9.png", "red", picture("red", 1))])
    put(tmp_path, {"red/1.png": picture("red", 1)})
    intake = take(tmp_path)
    assert intake.quarantined == {"duplicate": 1}
    assert "red/9.png of the source" in intake.examples[0]


def test_of_equal_images_in_the_inbox_one_is_packed(tmp_path):
    put(tmp_path, {f"red/{name}.png": picture("red", 1) for name in "abc"})
    intake = take(tmp_path)
    assert (intake.taken, intake.known) == ({"red": 1}, 2)
    assert files(tmp_path / "inbox") == {}
    assert {line["path"]: line["status"] for line in records(tmp_path)} == {"red/b.png": "twin", "red/c.png": "twin"}


@pytest.mark.parametrize("place", ["source", "additions", "inbox"])
def test_one_image_under_two_classes_is_no_ones(tmp_path, place):
    image = picture("red", 1)
    expected = {"label_conflict": 1}
    if place == "source":
        write_manifest(tmp_path, [("source", "blue/9.png", "blue", image)])
    elif place == "additions":
        (tmp_path / "additions").mkdir()
        write_tar(tmp_path / "additions" / "a.tar", [("blue/9.png", image)])
    else:
        put(tmp_path, {"blue/9.png": image})
        expected = {"label_conflict": 2}
    put(tmp_path, {"red/1.png": image})
    intake = take(tmp_path)
    assert (intake.quarantined, intake.archive) == (expected, None)
    assert any("the same image stands in class 'blue'" in example for example in intake.examples)


def test_a_conflict_lasts_until_the_wrong_one_is_gone(tmp_path):
    image = picture("red", 1)
    put(tmp_path, {"red/1.png": image, "blue/1.png": image})
    take(tmp_path, batch="one")
    place = tmp_path / "quarantine" / "one"
    (place / "red" / "1.png").rename(tmp_path / "inbox" / "red" / "1.png")
    assert take(tmp_path, batch="two").quarantined == {"label_conflict": 1}
    (tmp_path / "quarantine" / "two" / "red" / "1.png").rename(tmp_path / "inbox" / "red" / "1.png")
    (place / "blue" / "1.png").unlink()
    assert take(tmp_path, batch="three").taken == {"red": 1}


def test_a_bad_file_that_comes_every_night_is_quarantined_once(tmp_path):
    for night in range(3):
        put(tmp_path, {"red/1.png": b"bad"})
        intake = take(tmp_path, batch=f"night{night}")
        assert (intake.known, sum(intake.quarantined.values())) == (min(night, 1), int(night == 0))
    assert list(files(tmp_path / "quarantine")).count("night0/red/1.png") == 1
    (tmp_path / "quarantine" / "night0" / "red" / "1.png").write_bytes(b"changed")
    put(tmp_path, {"red/1.png": b"bad"})
    assert take(tmp_path, batch="night4").quarantined == {"not_an_image": 1}


# What is left


def test_files_still_being_written_are_left(tmp_path, monkeypatch):
    put(tmp_path, {"red/1.png": picture("red", 1)})
    os.utime(tmp_path / "inbox" / "red" / "1.png", (0, 0))  # as 'cp -p' does; only its change time is new
    intake = take(tmp_path, InboxParams())
    assert intake == Intake(left={BEING_WRITTEN: 1})
    assert intake.sentences() == ["Left 1 file (still being written: 1) for the next time."]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert take(tmp_path, InboxParams()).taken == {"red": 1}


def test_a_time_far_ahead_is_no_reason_to_wait_for_it(tmp_path, monkeypatch):
    put(tmp_path, {"red/1.png": picture("red", 1)})
    now = time.time()
    os.utime(tmp_path / "inbox" / "red" / "1.png", (now + 10**6, now + 10**6))
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert take(tmp_path, InboxParams()).taken == {"red": 1}


def test_unfinished_downloads_and_links_are_left(tmp_path):
    image = picture("red", 1)
    put(tmp_path, {"red/1.png.part": image, "red/2.PNG.crdownload": image, "red/3.png.download/3.png": image})
    (tmp_path / "elsewhere.png").write_bytes(picture("red", 2))
    (tmp_path / "inbox" / "red" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "inbox" / "blue").symlink_to(tmp_path / "inbox" / "red")
    os.mkfifo(tmp_path / "inbox" / "red" / "pipe.png")
    before = files(tmp_path)
    assert take(tmp_path) == Intake(left={BEING_WRITTEN: 3, NOT_PLAIN: 3})
    assert files(tmp_path) == before


@pytest.mark.parametrize("moment", ["examine", "compare", "_pack", "_write_record"])
def test_a_file_that_changes_meanwhile_is_left(tmp_path, monkeypatch, moment):
    """A person saves other images under the same names, before or after the old ones were packed."""
    put(tmp_path, {"red/1.png": picture("red", 1), "red/2.png": picture("red", 2), "red/bad.png": b"bad"})
    newer = {"red/1.png": picture("red", 71), "red/bad.png": picture("red", 72)}
    original = getattr(module, moment)

    def interfere(*args):
        result = original(*args)
        put(tmp_path, newer)
        return result

    monkeypatch.setattr(module, moment, interfere)
    intake = take(tmp_path)
    assert intake.left == {CHANGED: 2}
    assert files(tmp_path / "inbox") == newer
    packed = set(members(tmp_path).values())
    assert picture("red", 2) in packed
    assert not packed & set(newer.values())
    monkeypatch.undo()
    take(tmp_path)
    assert set(newer.values()) <= set(members(tmp_path).values())


def test_before_there_is_a_data_set_all_is_left(tmp_path):
    put(tmp_path, {"red/1.png": picture("red", 1), "red/bad.png": b"bad"})
    assert take(tmp_path, classes=None) == Intake(left={NO_CLASSES_YET: 2})
    assert take(tmp_path, InboxParams(settle_seconds=0, classes="grow"), classes=None).taken == {"red": 1}


# Classes


def test_with_grow_new_classes_come_in(tmp_path):
    put(tmp_path, {"violet/1.png": picture("red", 1), "a\\b/1.png": picture("red", 2)})
    intake = take(tmp_path, InboxParams(settle_seconds=0, classes="grow"))
    assert intake.taken == {"violet": 1}
    assert intake.quarantined == {"unknown_class": 1}
    assert "backslash" in intake.examples[0]


def test_a_class_is_the_same_however_its_accents_are_written(tmp_path):
    put(tmp_path, {"cafe\u0301/1.png": picture("red", 1), "caf\u00e9/1.png": picture("red", 2)})
    assert take(tmp_path, classes=["caf\u00e9", "the\u0301"]).taken == {"caf\u00e9": 2}
    put(tmp_path, {"th\u00e9/1.png": picture("red", 3)})
    assert take(tmp_path, classes=["caf\u00e9", "the\u0301"]).taken == {"the\u0301": 1}


def test_known_classes_are_those_expected_or_prepared_or_in_service(tmp_path):
    prepared, models = tmp_path / "prepared", tmp_path / "models"
    assert known_classes(prepared, models) is None
    (models / "registry" / "m1").mkdir(parents=True)
    (models / "registry" / "m1" / "bundle.json").write_text('{"classes": ["served"]}')
    (models / "champion.json").write_text('{"id": "m1"}')
    assert known_classes(prepared, models) == ["served"]
    prepared.mkdir()
    (prepared / "classes.json").write_text('["prepared"]')
    assert known_classes(prepared, models) == ["prepared"]
    assert known_classes(prepared, models, ("expected",)) == ["expected"]


# Trouble


def test_an_archive_that_reads_back_otherwise_is_not_published(tmp_path, monkeypatch):
    put(tmp_path, {"red/1.png": picture("red", 1)})

    def flipping(destination, content):
        write_tar(destination, content)
        data = bytearray(destination.read_bytes())
        data[data.index(b"IDAT") + 6] ^= 1
        destination.write_bytes(data)

    monkeypatch.setattr(module, "write_tar", flipping)
    before = files(tmp_path)
    with pytest.raises(NightlyError, match="read back otherwise than written"):
        take(tmp_path)
    assert files(tmp_path) == before


def test_a_full_disk_leaves_the_inbox_as_it_was(tmp_path, monkeypatch):
    put(tmp_path, {"red/1.png": picture("red", 1), "red/bad.png": b"bad"})

    def full(destination, content):
        destination.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tar", full)
    before = files(tmp_path)
    with pytest.raises(OSError, match="No space"):
        take(tmp_path)
    assert files(tmp_path) == before


def test_an_inbox_on_another_file_system(tmp_path, monkeypatch):
    other_file_system(monkeypatch)
    put(tmp_path, {"red/1.png": picture("red", 1), "red/bad.png": b"bad"})
    assert take(tmp_path, batch="night").quarantined == {"not_an_image": 1}
    assert files(tmp_path / "quarantine" / "night") == {"red/bad.png": b"bad"}
    assert files(tmp_path / "inbox") == {}


def other_file_system(monkeypatch):
    rename = os.rename

    def refuse(source, destination, **options):
        if "inbox" in Path(source).parts and "inbox" not in Path(destination).parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, destination, **options)

    monkeypatch.setattr(os, "rename", refuse)


# Kills


def test_what_a_killed_call_left_goes_even_with_an_empty_inbox(tmp_path):
    (tmp_path / "additions").mkdir()
    left = tmp_path / "additions" / f".intake.partial-{2**22 + 1}"  # above the largest process number
    left.write_bytes(b"half an archive")
    assert is_waiting(tmp_path / "inbox", tmp_path / "additions")
    assert take(tmp_path) == Intake()
    assert not left.exists()


class Killed(BaseException):
    """Stands for SIGKILL: from here on, the file system hears nothing more of the process."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``step`` steps happen and none after."""
    done = itertools.count()

    def last_words(function, changes=lambda *args, **options: True):
        def call(*args, **options):
            if changes(*args, **options) and next(done) >= step:
                raise Killed
            return function(*args, **options)

        return call

    def for_writing(file, mode="r", *args, **options):
        return mode[0] in "wxa"

    for name in ("mkdir", "rename", "replace", "unlink", "remove", "fsync"):
        monkeypatch.setattr(os, name, last_words(getattr(os, name)))
    monkeypatch.setattr(io, "open", last_words(io.open, for_writing))
    monkeypatch.setattr(tarfile, "bltn_open", last_words(tarfile.bltn_open, for_writing))
    monkeypatch.setattr(module, "read_file", last_words(module.read_file))  # in the middle of writing an archive


def everything(root: Path) -> None:
    """Fill the inbox with every kind of file."""
    put(root, {f"red/{seed}.png": picture("red", seed) for seed in range(3)})
    put(root, {"blue/1.png": picture("blue", 1), "blue/twin.png": picture("blue", 1)})
    put(root, {"red/bad.png": b"bad", "loose.png": picture("red", 20), "mauve/1.png": picture("red", 21)})
    put(root, {"red/both.png": picture("red", 22), "green/both.png": picture("red", 22)})
    (root / "additions").mkdir()
    write_tar(root / "additions" / "20260101-old.tar", [("green/old.png", picture("green", 1))])
    write_manifest(root, [("source", "green/2.png", "green", picture("green", 2))])
    put(root, {"green/known.png": picture("green", 1), "green/source.png": picture("green", 2)})


def check_accounts(root: Path, dropped: dict[str, bytes]) -> None:
    """Check that each file is in exactly one place: in the inbox, in quarantine, or in an archive by its content."""
    contents = [(name.split("/")[0], data) for archive in archives(root) for name, data in read_members(archive)]
    assert len(set(contents)) == len(contents), "an image is in the additions twice"
    still, quarantined = files(root / "inbox"), files(root / "quarantine")
    listed = {(line["path"], line["sha256"]) for line in records(root)}
    for path, data in dropped.items():
        in_quarantine = [name for name in quarantined if name.partition("/")[2] == path]
        places = [path] * (path in still) + in_quarantine + [""] * ((path.split("/")[0], data) in contents)
        assert len(places) == 1, f"{path} is in {places}"
        assert data in (
            still.get(path),
            *(quarantined[name] for name in in_quarantine),
            *(found for _, found in contents),
        )
        if in_quarantine:
            assert (path, hashlib.sha256(data).hexdigest()) in listed


@pytest.mark.parametrize("other_device", [False, True])
def test_a_kill_at_any_step_loses_and_doubles_nothing(tmp_path, monkeypatch, other_device):
    outcome = None
    for step in itertools.count():
        root = tmp_path / str(step)
        everything(root)
        dropped = files(root / "inbox")
        with monkeypatch.context() as patch:
            if other_device:
                other_file_system(patch)
            with patch.context() as kill:
                killed_at(step, kill)
                try:
                    take(root, batch="killed")
                    finished = True
                except Killed:
                    finished = False
            intake = take(root, batch="next")
            assert not [name for name in files(root) if ".partial-" in name]
            check_accounts(root, dropped)
            assert files(root / "inbox") == {}
            packed = sorted((name, data) for archive in archives(root) for name, data in read_members(archive))
            outcome = outcome or packed
            assert packed == outcome
            assert {line["path"] for line in records(root) if line["status"] == "label_conflict"} == {
                "red/both.png",
                "green/both.png",
            }
        shutil.rmtree(root)
        if finished:
            assert intake == Intake()
            break
    assert step > 25


RUNNER = """
import sys
from pathlib import Path
from tasks.images import DecodePolicy
from tasks.inbox import InboxParams, take_in
root = Path(sys.argv[1])
import pyarrow.parquet
print("ready", flush=True)
sys.stdin.readline()
take_in(root / "inbox", root / "additions", root / "quarantine", InboxParams(settle_seconds=0),
        prepared=root / "prepared", classes=["blue", "green", "red"], decode_policy=DecodePolicy(size=8))
print("done", flush=True)
"""


def night(root: Path, kill_after_seconds: float | None) -> float | None:
    """Take in, in a process of its own, killed unless it is done by then; return its seconds if it was not killed."""
    with subprocess.Popen([sys.executable, "-c", RUNNER, str(root)], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        started = time.perf_counter()
        print(file=process.stdin, flush=True)
        if kill_after_seconds is not None:
            time.sleep(kill_after_seconds)
            process.send_signal(signal.SIGKILL)
        elif process.stdout.readline() == "done\n":
            return time.perf_counter() - started
        assert process.wait() in (0, -signal.SIGKILL)
    return None


@pytest.mark.slow
def test_sigkill_at_random_moments_while_a_person_adds_files(tmp_path):
    everything(tmp_path)
    dropped = files(tmp_path / "inbox")
    chance = random.Random(5)
    numbers = itertools.count(100)
    enough = threading.Event()

    def person():
        while not enough.wait(0.002):
            seed = next(numbers)
            color = CLASSES[seed % 3]
            path = f"{color}/{seed}.png"
            data = picture(color, seed) if seed % 4 else f"bad {seed}".encode()
            put(tmp_path, {f"{path}.part": data})
            dropped[path] = data
            (tmp_path / "inbox" / f"{path}.part").rename(tmp_path / "inbox" / path)

    adding = threading.Thread(target=person)
    adding.start()
    try:
        usual = night(tmp_path, None)
        for _ in range(8):
            night(tmp_path, chance.uniform(0, 1.5 * usual))
    finally:
        enough.set()
        adding.join()
    assert night(tmp_path, None)
    assert len(dropped) > 100
    check_accounts(tmp_path, dropped)
    assert files(tmp_path / "inbox") == {}
    assert not [name for name in files(tmp_path) if ".partial-" in name]
    assert len(archives(tmp_path)) > 2


# As the flow calls it


def dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_flow_takes_in_by_a_child_and_versions_the_archive(tmp_path):
    from flows import inbox
    from flows.workspace import Workspace

    workspace, said = Workspace(tmp_path), []
    data, logs = tmp_path / "data", tmp_path / ".nightly" / "logs" / "20260102-020000"
    assert inbox.take_in(workspace, logs, 0, said.append) == Intake()
    assert list(tmp_path.iterdir()) == []

    dvc(tmp_path, "init", "--no-scm", "--quiet")
    put(data, {"red/1.png": picture("red", 1), "violet/1.png": picture("red", 2)})
    workspace.params.write_text(
        "prepare: {decode: {size: 8}, expected_classes: [red, blue]}\ninbox: {classes: grow, settle_seconds: 0}\n"
    )
    intake = inbox.take_in(workspace, logs, 0, said.append)
    assert (intake.taken, intake.quarantined) == ({"red": 1}, {"unknown_class": 1})
    (archive,) = archives(data)
    assert archive.name == intake.archive
    assert intake.archive.startswith("20260102-020000-")
    assert (data / "quarantine" / intake.record).is_file()
    assert said == intake.sentences()

    # A pull that was forgotten may not become a training on less; what a killed run left is versioned by the next.
    content = archive.read_bytes()
    archive.unlink()
    write_tar(data / "additions" / "20260101-left.tar", [("blue/1.png", picture("blue", 1))])
    said.clear()
    assert inbox.is_due(workspace)
    assert inbox.take_in(workspace, logs, 0, said.append) == Intake()
    assert archive.read_bytes() == content
    assert said == [f"fetched {archive.name}", "versioned 20260101-left.tar"]
    assert "up to date" in dvc(tmp_path, "status")
    assert not inbox.is_due(workspace)
