import os
import time

import numpy as np
import pytest

from tasks import checkpoint as module
from tasks.checkpoint import Checkpoints, State, run_key


def state(number: int) -> State:
    return State({"weights": np.full((3, 2), number, np.float32), "step": np.asarray(number)}, {"epoch": number})


def test_what_was_saved_comes_back(tmp_path):
    Checkpoints(tmp_path, "run").save(state(7))
    found = Checkpoints(tmp_path, "run").load()
    np.testing.assert_array_equal(found.arrays["weights"], np.full((3, 2), 7, np.float32))
    assert found.arrays["weights"].dtype == np.float32
    assert int(found.arrays["step"]) == 7
    assert found.facts["epoch"] == 7


def test_there_is_nothing_to_load_at_first(tmp_path):
    assert Checkpoints(tmp_path / "none", "run").load() is None


def test_the_newest_of_two_is_loaded_also_after_a_restart(tmp_path):
    for number in range(1, 6):
        checkpoints = Checkpoints(tmp_path, "run")  # a process of its own each time
        checkpoints.load()
        checkpoints.save(state(number))
        assert Checkpoints(tmp_path, "run").load().facts["epoch"] == number
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a.npz", "b.npz"]


def damage(path, how):
    content = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(os.urandom(200))
        case "flipped":  # inside the array's data, which only a checksum notices
            middle = content.index(np.full((3, 2), 2, np.float32).tobytes())
            path.write_bytes(content[:middle] + b"\xff" + content[middle + 1 :])


@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "flipped"])
def test_a_damaged_file_is_named_and_the_one_before_it_used(tmp_path, how, capsys):
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save(state(1))
    checkpoints.save(state(2))
    damage(tmp_path / "run" / "a.npz", how)  # the second one
    found = Checkpoints(tmp_path, "run").load()
    assert found.facts["epoch"] == 1
    assert "a.npz is damaged" in capsys.readouterr().out


def test_two_damaged_files_are_no_checkpoint(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save(state(2))
    checkpoints.save(state(2))
    for name in ("a.npz", "b.npz"):
        damage(tmp_path / "run" / name, "cut")
    assert Checkpoints(tmp_path, "run").load() is None
    assert capsys.readouterr().out.count("is damaged") == 2


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save(state(1))

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(state(2))
    assert Checkpoints(tmp_path, "run").load().facts["epoch"] == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["b.npz"]


def test_clearing_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save(state(1))
    checkpoints.clear()
    assert not (tmp_path / "run").exists()
    checkpoints.clear()


def test_those_of_other_runs_stay_for_a_week(tmp_path):
    for name, days in (("recent", 6), ("old", 8), ("mine", 9)):
        Checkpoints(tmp_path, name).save(state(1))
        then = time.time() - days * 86400
        os.utime(tmp_path / name, (then, then))
    Checkpoints(tmp_path, "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "recent"]


def test_the_key_is_that_of_code_data_and_parameters(tmp_path, monkeypatch):
    base = {"params": {"epochs": 2}, "data": "d1"}
    assert run_key(base) == run_key({"data": "d1", "params": {"epochs": 2}})
    assert len({run_key(base), run_key({**base, "data": "d2"}), run_key({**base, "params": {"epochs": 3}})}) == 3
    (tmp_path / "checkpoint.py").write_text("one = 1\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "checkpoint.py"))
    first = run_key(base)
    (tmp_path / "layers.py").write_text("two = 2\n")
    assert run_key(base) != first
