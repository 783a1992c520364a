"""What a night does with its verdict, over several nights."""

import shutil

import pytest

from flows import champion
from flows.settings import RetrainParams
from flows.workspace import Workspace
from tasks import promote as registry
from tests.miniature import export


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    monkeypatch.setattr(champion.stages, "track", lambda *arguments: None)
    return Workspace(tmp_path)


def night(workspace: Workspace, model_id: str, accuracy: float) -> str:
    """Export a model, judge it, carry the verdict out; return the verdict's action."""
    for path in (workspace.exported, workspace.evaluation):
        shutil.rmtree(path, ignore_errors=True)
    exported, evaluation = export(workspace.root / "made" / model_id, model_id, accuracy)
    shutil.copytree(exported, workspace.exported)
    shutil.copytree(evaluation, workspace.evaluation)
    judgement = champion.judge_exported(workspace, RetrainParams(), workspace.root / "log", print)
    champion.carry_out(workspace, judgement, 0.0, print)
    return judgement.verdict.action


def ledger(workspace: Workspace) -> list[tuple[str, str]]:
    return [(entry.action, entry.id) for entry in registry.history(workspace.models)]


def test_a_rollback_outlives_the_next_night(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "bbb", 0.95)
    champion.roll_back(workspace, None, "confuses lions with cats")
    assert night(workspace, "bbb", 0.95) == "hold"
    assert registry.champion_id(workspace.models) == "aaa"
    held = registry.history(workspace.models)[-1]
    assert "confuses lions with cats" in held.reasons[0]
    assert "nightly promote bbb" in held.reasons[1]
    assert night(workspace, "ccc", 0.96) == "promote", "another model is judged as ever"


def test_a_model_put_back_by_hand_is_no_longer_withdrawn(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "bbb", 0.95)
    champion.roll_back(workspace, None, "a mistake")
    champion.promote_by_hand(workspace, "bbb", "the mistake was mine", print)
    assert registry.withdrawal(workspace.models, "bbb") is None
    assert registry.withdrawal(workspace.models, "aaa") is None


def test_nights_without_news_leave_the_ledger_alone(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "aaa", 0.9)
    assert ledger(workspace) == [("promote", "aaa")]
    for _ in range(3):
        night(workspace, "bbb", 0.8)
    assert ledger(workspace) == [("promote", "aaa"), ("hold", "bbb")]
    night(workspace, "ccc", 0.8)
    night(workspace, "bbb", 0.8)
    assert ledger(workspace)[2:] == [("hold", "ccc"), ("hold", "bbb")]
