"""Predictions that are stopped, killed or out of disk: the same command goes on, and nothing wrong is left."""

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows import cli
from tasks.images import encode_png
from tasks.outcome import PredictParams
from tasks.plan import part_name
from tasks.predict import predict
from tasks.store import FILES, PARTS
from tests.conftest import COLORS, colored_image
from tests.test_hostile_folder import without_superpowers

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty good images."""
    source = tmp_path / "source"
    source.mkdir()
    for seed in range(10):
        for name in COLORS:
            (source / f"{name}{seed}.png").write_bytes(encode_png(colored_image(name, seed)))
    return source


@pytest.mark.parametrize("left", [[PARTS], [PARTS, FILES]])
def test_parts_without_their_plan_count_for_nothing(folder: Path, exported: Path, tmp_path: Path, left: list) -> None:
    """A kill between the two leaves them so: in the removal of a result, or before the plan of a complete one."""
    predict(folder, tmp_path / "out", exported, PredictParams(threshold=0.0, shard_files=4))
    unfinished = tmp_path / ".new.unfinished"
    for name in left:
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if name == PARTS else shutil.copy)(tmp_path / "out" / name, unfinished / name)
    summary = predict(folder, tmp_path / "new", exported, PredictParams(threshold=1.0, shard_files=10))
    table = pq.read_table(tmp_path / "new" / PARTS)
    assert summary.resumed_files == 0
    assert len(table) == 30
    assert not any(table["accepted"].to_pylist())


def test_a_result_is_taken_over_whole_or_not_at_all(folder: Path, exported: Path, tmp_path: Path) -> None:
    params = PredictParams(shard_files=4)
    predict(folder, tmp_path / "out", exported, params)
    shutil.copytree(tmp_path / "out" / PARTS, tmp_path / ".out.unfinished" / PARTS)
    shutil.copy(tmp_path / "out" / PARTS / part_name(0), tmp_path / ".out.unfinished" / PARTS / part_name(99))
    summary = predict(folder, tmp_path / "out", exported, params)
    assert summary.resumed_files == summary.counts.files == 30
    assert len(pq.read_table(tmp_path / "out" / PARTS)) == 30


def test_a_complete_result_is_not_taken_over_where_files_could_not_be_read(folder, exported, tmp_path) -> None:
    (folder / "blue3.png").chmod(0)
    with without_superpowers():
        summary = predict(folder, tmp_path / "out", exported, PredictParams(shard_files=4))
    assert summary.counts.statuses == {"ok": 29, "unreadable": 1}
    (folder / "blue3.png").chmod(0o644)
    summary = predict(folder, tmp_path / "out", exported, PredictParams(shard_files=4))
    assert summary.counts.statuses == {"ok": 30}
    assert summary.resumed_files == 26


def test_what_a_killed_run_unpacked_serves_the_next_one_and_goes(folder, exported, tmp_path, monkeypatch) -> None:
    import tasks.members

    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
        archive.add(folder, "images")
    unpacked = []
    decompressed = tasks.members.decompressed
    monkeypatch.setattr(tasks.members, "decompressed", lambda *given: unpacked.append(given) or decompressed(*given))
    with monkeypatch.context() as patch:
        # A killed process removes nothing.
        patch.setattr(tasks.plan.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(tasks.predict, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(tmp_path / "images.tar.gz", tmp_path / "out", exported, PredictParams())
    summary = predict(tmp_path / "images.tar.gz", tmp_path / "out", exported, PredictParams())
    assert len(unpacked) == 1
    assert summary.counts.statuses == {"ok": 30}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.tar.gz", "out", "source"]


# Signals


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace with 4,000 images and small shards."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text("predict: {shard_files: 50}")
    (tmp_path / "many").mkdir()
    for number in range(4000):
        color = sorted(COLORS)[number % 3]
        if number < 30:
            (tmp_path / "many" / f"{number}.png").write_bytes(encode_png(colored_image(color, number)))
        else:
            os.link(tmp_path / "many" / f"{number % 30}.png", tmp_path / "many" / f"{number}.png")
    return tmp_path


def start(workspace: Path, model: Path, out: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "predict", "many", "--model", str(model), "--out", out],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_line_and_the_same_command_goes_on(workspace: Path, exported: Path, number) -> None:
    process = start(workspace, exported, "out")
    while not (workspace / ".out.unfinished" / PARTS / part_name(3)).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert err.startswith(f"interrupted: classifying stopped by {number.name}; the same command goes on")
    assert err.count("\n") == 1
    assert not (workspace / "out").exists()
    assert len(list((workspace / ".out.unfinished" / PARTS).iterdir())) < 80
    process = start(workspace, exported, "out")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "of them before" in out
    predict(workspace / "many", workspace / "whole", exported, PredictParams(shard_files=50))
    assert (workspace / "out/predictions.csv").read_bytes() == (workspace / "whole/predictions.csv").read_bytes()
    assert not [path.name for path in workspace.iterdir() if path.name.startswith(".out")]


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(exported: Path) -> None:
    command = [sys.executable, "benchmarks/predict_kill.py", "--kills", "3", "--files", "200", "--model", exported]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert (facts["kills"], facts["rows_lost"], facts["rows_twice"], facts["identical"]) == (3, 0, 0, True)


# A full disk


class Disk:
    """A disk with room for so many bytes of a result."""

    def __init__(self, room: float) -> None:
        self.room, self.used = room, 0
        self._open = Path.open

    def open(self, path: Path, mode: str = "r", *given, **named):
        if mode != "wb" or ".unfinished" not in str(path):
            return self._open(path, mode, *given, **named)
        disk = self

        class File(io.FileIO):
            def write(self, data) -> int:
                size = memoryview(data).nbytes
                if disk.used + size > disk.room:
                    super().write(memoryview(data).cast("B")[: int(disk.room - disk.used)])
                    disk.used = disk.room
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                disk.used += size
                return super().write(data)

        return File(path, "w")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.8, 0.95])
def test_a_full_disk_is_one_line_and_the_rerun_goes_on(
    folder: Path, exported: Path, tmp_path: Path, monkeypatch, capsys, share: float
) -> None:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text("predict: {shard_files: 4}")
    monkeypatch.chdir(tmp_path)

    def run(out: str, disk: Disk) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["nightly", "predict", "source", "--model", str(exported), "--out", out])
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(Path, "open", lambda *given, **named: disk.open(*given, **named))
            cli.main()
        return caught.value.code, capsys.readouterr().err

    large = Disk(math.inf)
    assert run("whole", large) == (0, "")
    code, err = run("out", Disk(large.used * share))
    assert (code, err) == (1, "error: the disk is full: free some space and run the same command again\n")
    assert not (tmp_path / "out").exists()
    left = [path for path in (tmp_path / ".out.unfinished").rglob("*") if path.is_file()]
    assert not [path for path in left if "partial" in path.name]
    for path in left:
        assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / ".out.unfinished")).read_bytes()
    assert run("out", large) == (0, "")
    for name in ("predictions.csv", *(f"{PARTS}/{part_name(shard)}" for shard in range(8))):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]
