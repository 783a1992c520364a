"""What a night does with its verdict, over several nights."""

import shutil
from contextlib import nullcontext

import pytest

from flows import champion, summary
from flows.settings import RetrainParams
from flows.workspace import Workspace
from tasks import promote as registry
from tasks.bundle import load_bundle
from tasks.errors import NightlyError
from tasks.files import read_json, write_json
from tests.miniature import export, metrics, write_predictions


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
    return decide(workspace).verdict.action


def decide(workspace: Workspace) -> champion.Judgement:
    """Judge what is exported and carry the verdict out."""
    judgement = champion.judge_exported(workspace, RetrainParams(), workspace.root / "log", print)
    champion.carry_out(workspace, judgement, 0.0, print)
    return judgement


def ledger(workspace: Workspace) -> list[tuple[str, str]]:
    return [(entry.action, entry.id) for entry in registry.history(workspace.models)]


def test_a_rollback_outlives_the_next_night(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "bbb", 0.95)
    champion.roll_back(workspace, None, "confuses lions with cats", print)
    assert night(workspace, "bbb", 0.95) == "hold"
    assert registry.champion_id(workspace.models) == "aaa"
    held = registry.history(workspace.models)[-1]
    assert "confuses lions with cats" in held.reasons[0]
    assert "nightly promote bbb" in held.reasons[1]
    assert night(workspace, "ccc", 0.96) == "promote", "another model is judged as ever"


def test_a_rollback_passes_over_a_model_that_was_held_before_it(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "bbb", 0.95)
    assert night(workspace, "ccc", 0.95) == "hold"
    champion.roll_back(workspace, None, "confuses lions with cats", print)
    assert night(workspace, "ccc", 0.95) == "hold", "nothing is new about it"
    held = registry.history(workspace.models)[-1]
    assert held.reasons[0].startswith("known when aaa was put back on ")
    assert "nightly promote ccc" in held.reasons[1]
    assert night(workspace, "ddd", 0.92) == "promote"
    assert night(workspace, "ccc", 0.95) == "hold"
    champion.promote_by_hand(workspace, "ccc", "on second thoughts", print)
    assert registry.withdrawal(workspace.models, "ccc") is None


def test_a_model_put_back_by_hand_is_no_longer_withdrawn(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "bbb", 0.95)
    champion.roll_back(workspace, None, "a mistake", print)
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


# --- what the judge is given


def test_both_models_predictions_are_compared_and_what_was_found_is_kept(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "bbb", 0.98)
    entry = registry.history(workspace.models)[-1]
    assert "8 images now right, 0 now wrong; p = 0.0078" in entry.reasons[0]
    assert entry.reasons[0] in read_json(workspace.models / "champion.json")["reason"]
    assert (entry.comparison["now_right"], entry.comparison["now_wrong"]) == (8, 0)
    night(workspace, "ccc", 0.9)
    held = registry.history(workspace.models)[-1]
    assert (held.action, held.comparison["now_right"], held.comparison["now_wrong"]) == ("hold", 0, 8)
    assert held.comparison["classes"][0]["change"] == -0.08


@pytest.fixture
def unpaired(workspace):
    """A champion from before predictions were kept, and a better model to judge."""
    night(workspace, "aaa", 0.9)
    (workspace.registry / "aaa" / "evaluation" / "predictions.parquet").unlink()
    exported, evaluation = export(workspace.root / "made" / "bbb", "bbb", 0.95)
    shutil.copytree(exported, workspace.exported, dirs_exist_ok=True)
    shutil.copytree(evaluation, workspace.evaluation, dirs_exist_ok=True)
    return workspace


def test_a_champion_without_predictions_is_measured_anew_once(unpaired, monkeypatch):
    calls = []

    def measure(command, **_):
        calls.append(command)
        out = unpaired.state / "champion-evaluation"
        out.mkdir(parents=True)
        write_json(out / "metrics.json", metrics("aaa", 0.9))
        write_predictions(out, 0.9, "ab")

    monkeypatch.setattr(champion.child, "run", measure)
    for _ in range(2):
        judgement = champion.judge_exported(unpaired, RetrainParams(), unpaired.root / "log", print)
        assert "5 images now right, 0 now wrong" in judgement.verdict.reasons[0]
    assert len(calls) == 1
    assert str(unpaired.registry / "aaa") in calls[0]


def test_a_champion_that_can_not_be_measured_is_compared_by_its_accuracy_and_that_is_said(unpaired, monkeypatch):
    def fail(command, **_):
        raise champion.StageFailed("judge: no memory")

    monkeypatch.setattr(champion.child, "run", fail)
    judgement = decide(unpaired)
    assert judgement.verdict.action == "promote"
    assert judgement.verdict.reasons == [
        "better than the champion on the frozen test set by 5.00 points",
        "compared by their accuracies alone: the champion's predictions are missing",
    ]
    assert registry.history(unpaired.models)[-1].comparison == {
        "gain": 0.05,
        "unpaired": "the champion's predictions are missing",
    }


def test_a_night_without_news_does_not_measure_the_champion(workspace, monkeypatch):
    night(workspace, "aaa", 0.9)
    (workspace.registry / "aaa" / "evaluation" / "predictions.parquet").unlink()
    monkeypatch.setattr(champion.child, "run", None)
    assert night(workspace, "aaa", 0.9) == "hold"


def test_only_an_engine_that_was_offered_can_hold_a_model(workspace):
    night(workspace, "aaa", 0.9)
    night(workspace, "bbb", 0.8)
    found = {"agreement": 0.99, "accuracy_lost": 0.004, "passed": False}
    write_json(workspace.evaluation / "metrics.json", metrics("bbb", 0.95) | {"engines": {"openvino-float32": found}})
    write_predictions(workspace.evaluation, 0.95, "ab")
    for offered, action in ((True, "hold"), (False, "promote")):
        engines = {"openvino-float32": {"agreement": 1.0, "offered": offered}}
        load_bundle(workspace.exported).changed(engines=engines).save()
        judgement = champion.judge_exported(workspace, RetrainParams(), workspace.root / "log", print)
        assert judgement.verdict.action == action


def test_the_nights_page_shows_what_the_judge_found(workspace):
    def page(judgement: champion.Judgement) -> str:
        nothing = summary.Predictions(note="nothing")
        return summary.markdown(summary.Night("r1", judgement, "aaa", [], nothing, "report.html", "logs", 1.0))

    night(workspace, "aaa", 0.9)
    assert "challenger against champion" not in page(decide(workspace))
    night(workspace, "bbb", 0.8)
    found = page(decide(workspace))
    assert "| accuracy | -10.00 points |" in found
    assert "| image by image | 0 images now right, 10 now wrong; p = 0.002 |" in found
    assert "| recall lost | a -10.00 points (0 now right, 5 now wrong of 50; p = 0.031); b -10.00 points (" in found
    (workspace.evaluation / "predictions.parquet").unlink()
    assert "| image by image | not compared: the challenger's predictions are missing |" in page(decide(workspace))


@pytest.mark.parametrize(
    ("now", "params", "what"),
    [
        ("ab", "", None),
        ("a", "", "b gone"),
        ("a", "inbox: {classes: grow}", "b gone"),
        ("abc", "", "c new"),
        ("abc", "inbox: {classes: grow}", None),
        ("ad", "inbox: {classes: grow}", "b gone; d new"),
        ("ad", "prepare: {expected_classes: [a, d]}", None),
        ("xy", "", None),  # another task altogether
    ],
)
def test_other_classes_than_the_champions_are_refused_unless_they_are_meant(workspace, tmp_path, now, params, what):
    exported, evaluation = export(tmp_path / "made", "m1")  # of classes a and b
    registry.register(exported, evaluation, workspace.registry)
    registry.promote(workspace.models, "m1", registry.Verdict("promote", ["first"]))
    workspace.params.write_text(f"{params}\n")
    write_json(workspace.prepared / "classes.json", list(now))
    with nullcontext() if what is None else pytest.raises(NightlyError, match=f"model in service, m1: {what}. Bring"):
        champion.require_known_classes(workspace, RetrainParams(), tmp_path / "log", print)
