"""Predictions that are stopped, killed or out of disk: the same command goes on, and nothing wrong is left."""

import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.images import encode_png
from tasks.outcome import PredictParams
from tasks.plan import FILES, PARTS, part_name
from tasks.predict import predict
from tests.conftest import COLORS, colored_image


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
