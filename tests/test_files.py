import errno
import json
import os

import pytest

from tasks.errors import NightlyError, describe
from tasks.files import append_line, publish_directory, publish_file, sha256_file, write_json


class Trouble(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with publish_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    with pytest.raises(Trouble), publish_file(target) as partial:
        partial.write_text("half")
        raise Trouble
    assert target.read_text() == "new"
    assert names(target.parent) == ["a.txt"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "bundle"
    with publish_directory(target) as partial:
        (partial / "one").write_text("1")
        assert not target.exists()
    with pytest.raises(Trouble), publish_directory(target) as partial:
        (partial / "two").write_text("2")
        raise Trouble
    assert names(target) == ["one"]
    with publish_directory(target) as partial:
        (partial / "three").write_text("3")
        assert names(target) == ["one"]
    assert names(target) == ["three"]
    assert names(tmp_path) == ["bundle"]


def left_behind(tmp_path, kind, owner):
    folder = tmp_path / f".bundle.{kind}-{owner}"
    folder.mkdir()
    (folder / "stale").write_text("x")
    return folder


def test_what_a_killed_run_left_behind_is_removed(tmp_path):
    dead = left_behind(tmp_path, "partial", 2**22 + 1)  # above the largest process number
    own = left_behind(tmp_path, "partial", os.getpid())
    alive = left_behind(tmp_path, "partial", os.getppid())
    with publish_directory(tmp_path / "bundle") as partial:
        (partial / "fresh").write_text("y")
    assert names(tmp_path / "bundle") == ["fresh"]
    assert not dead.exists()
    assert not own.exists()
    assert alive.exists(), "another process may still be writing there"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    left_behind(tmp_path, "old", 2**22 + 1)
    with pytest.raises(Trouble), publish_directory(tmp_path / "bundle"):
        raise Trouble
    assert names(tmp_path / "bundle") == ["stale"]
    assert names(tmp_path) == ["bundle"]


def test_json_is_written_for_people_and_without_nan(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Katze 🐈", "value": 1})
    assert "Katze 🐈" in (tmp_path / "a.json").read_text()
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "Katze 🐈", "value": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["value"] == 1


@pytest.mark.parametrize("there", [[], [b"whole", b""], [b"whole", b"torn \xc3"]])
def test_a_line_is_added_on_a_line_of_its_own(tmp_path, there):
    file, texts = tmp_path / "lines.jsonl", ["first é", "bad \udcff\ud800"]
    file.write_bytes(b"\n".join(there))
    for text in texts:
        append_line(file, json.dumps(text, ensure_ascii=False))
    *before, first, second, end = file.read_bytes().split(b"\n")
    assert [json.loads(first), json.loads(second), end] == [*texts, b""]
    assert before == [line for line in there if line]


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_errors_are_one_plain_line():
    assert describe(NightlyError("epochs must be 1 or more, but is 0")) == "epochs must be 1 or more, but is 0"
    full = describe(OSError(errno.ENOSPC, "No space left on device", "out.bin"))
    assert "disk is full (out.bin)" in full
    assert describe(PermissionError(errno.EACCES, "Permission denied", "secret")) == "no permission (secret)"
    assert (
        describe(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) == "No such file or directory (x)"
    )
