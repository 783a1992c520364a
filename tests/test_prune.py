"""Which models' local copies go, and that each of them comes back."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import champion, storage
from flows.prune import prune
from flows.storage import Copies
from flows.workspace import Workspace
from tasks import promote as ledger
from tasks.promote import Verdict
from tests.miniature import export


def promote(workspace: Workspace, *model_ids: str) -> None:
    """Register models and put them in service, one after the other."""
    for model_id in model_ids:
        exported, evaluation = export(workspace.root / "made" / model_id, model_id)
        ledger.register(exported, evaluation, workspace.registry)
        (workspace.registry / f"{model_id}.dvc").touch()
        ledger.promote(workspace.models, model_id, Verdict("promote", ["better"]))


def local(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in workspace.registry.iterdir() if path.is_dir())


def run(workspace: Workspace, keep: int | None, said: list[str] | None = None) -> list[str]:
    return prune(workspace, keep, log=workspace.state / "log", emit=(said if said is not None else []).append)


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


@pytest.fixture
def all_expendable(monkeypatch):
    """DVC holds everything, and what it was asked about."""
    asked: list[str] = []

    def copies(root, paths, **options):
        asked.extend(path.name for path in paths)
        return dict.fromkeys(paths, Copies(unchanged=True, in_cache=True, in_remote=False))

    monkeypatch.setattr(storage, "copies", copies)
    return asked


def test_the_newest_the_champion_and_the_one_to_roll_back_to_stay(workspace, all_expendable):
    promote(workspace, "m1", "m2", "m3", "m4", "m5")
    assert run(workspace, 3) == ["m1", "m2"]
    assert local(workspace) == ["m3", "m4", "m5"]
    assert run(workspace, 1) == ["m3"], "m5 is in service, m4 was before it"
    ledger.rollback(workspace.models, "m4", "worse after all")
    promote(workspace, "m6")
    assert run(workspace, 1) == ["m5"]
    assert local(workspace) == ["m4", "m6"]
    assert ledger.rollback_target(workspace.models) == "m4"


def test_a_model_is_as_old_as_its_last_service(workspace, all_expendable):
    promote(workspace, "m1", "m2", "m3", "m4")
    ledger.promote(workspace.models, "m1", Verdict("promote", ["by hand"]))
    assert run(workspace, 2) == ["m2", "m3"]


def test_without_a_limit_nothing_goes_and_nobody_is_asked(workspace, all_expendable):
    promote(workspace, "m1", "m2", "m3")
    assert run(workspace, None) == []
    assert run(workspace, 3) == []
    assert all_expendable == []
    assert local(workspace) == ["m1", "m2", "m3"]


def test_a_model_that_is_being_registered_stays(workspace, all_expendable):
    promote(workspace, "m1", "m2", "m3")
    (workspace.registry / "m4").mkdir()
    assert run(workspace, 1) == ["m1"]
    assert local(workspace) == ["m2", "m3", "m4"]


@pytest.mark.parametrize(
    ("copies", "reason"),
    [
        (Copies(unchanged=True, in_cache=False, in_remote=False), "neither DVC's cache nor its remote holds it"),
        (Copies(unchanged=False, in_cache=True, in_remote=True), "it was changed by hand"),
    ],
)
def test_what_dvc_could_not_bring_back_stays(workspace, monkeypatch, copies, reason):
    promote(workspace, "m1", "m2", "m3")
    monkeypatch.setattr(storage, "copies", lambda root, paths, **options: dict.fromkeys(paths, copies))
    said: list[str] = []
    assert run(workspace, 1, said) == []
    assert said == [f"m1 is not pruned: {reason}"]
    assert local(workspace) == ["m1", "m2", "m3"]


def test_a_failure_is_one_line_and_removes_nothing(workspace, all_expendable):
    promote(workspace, "m1", "m2", "m3")
    (workspace.models / "champion.json").write_text("torn")
    said: list[str] = []
    assert run(workspace, 1, said) == []
    assert len(said) == 1
    assert said[0].startswith("pruning is postponed: ")
    assert "champion.json is damaged" in said[0]
    assert local(workspace) == ["m1", "m2", "m3"]


def test_what_a_killed_pruning_left_is_removed(workspace, all_expendable):
    promote(workspace, "m1", "m2", "m3")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (workspace.registry / "m1").rename(workspace.registry / f".m1.partial-{ended.pid}")
    assert run(workspace, 1) == []
    assert local(workspace) == ["m2", "m3"]


# --- with DVC


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_pruned_models_come_back_from_cache_and_remote_and_what_is_in_neither_stays(workspace):
    root, remote = workspace.root / "workspace", workspace.root / "remote"
    workspace = Workspace(root)
    cache = root / ".dvc" / "cache" / "files" / "md5"
    root.mkdir()
    dvc(root, "init", "--no-scm", "--quiet")
    (root / ".dvc" / "config").write_text(
        f"[core]\n analytics = false\n no_scm = true\n remote = storage\n['remote \"storage\"']\n url = {remote}\n"
    )
    promote(workspace, "m1", "m2", "m3", "m4", "m5")
    for pointer in workspace.registry.glob("*.dvc"):
        pointer.unlink()
    dvc(root, "add", "--quiet", *(f"models/registry/m{number}" for number in range(1, 6)))
    before = {name: content(workspace.registry / name) for name in ("m1", "m2")}

    # The cache is emptied before anything was pushed, and the remote knows of m1 only.
    storage.push(root, log=root / "log", emit=print)
    shutil.rmtree(cache)
    (workspace.registry / "m3" / "model.keras").write_text("meddled with")
    weights_of_m2 = next(path for path in remote.rglob("*") if path.is_file() and path.read_bytes() == b"weights of m2")
    weights_of_m2.rename(workspace.root / "hidden")
    said: list[str] = []
    assert run(workspace, 1, said) == ["m1"]
    assert said == [
        "m2 is not pruned: neither DVC's cache nor its remote holds it",
        "m3 is not pruned: it was changed by hand",
    ]
    (workspace.root / "hidden").rename(weights_of_m2)
    assert run(workspace, 1) == ["m2"]
    assert local(workspace) == ["m3", "m4", "m5"]

    champion.roll_back(workspace, "m1", "it was good", print)
    assert content(workspace.registry / "m1") == before["m1"]
    # What came back is in the cache now, so that the remote is no longer needed.
    shutil.rmtree(remote)
    assert "m1" not in run(workspace, 1), "in service"
    champion.roll_back(workspace, "m4", "the other one was good, too", print)
    assert run(workspace, 1) == ["m1"]
    champion.roll_back(workspace, "m1", "after all", print)
    assert content(workspace.registry / "m1") == before["m1"]
