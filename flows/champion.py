"""What ``tasks.promote`` decides and writes, with DVC's care of the registry round it. No Prefect in here."""

import sys
from dataclasses import dataclass
from pathlib import Path

from flows import child, stages, storage
from flows.child import StageFailed
from flows.settings import RetrainParams, read_settings
from flows.stages import Emit
from flows.workspace import Workspace
from tasks import judge, registry
from tasks import promote as ledger
from tasks.bundle import load_bundle
from tasks.errors import NightlyError
from tasks.files import read_json
from tasks.judge import Evaluated, Metrics, Verdict
from tasks.promote import Entry


@dataclass(frozen=True)
class Judgement:
    """A verdict and the two sets of metrics that it rests on."""

    verdict: Verdict
    challenger: Metrics
    champion: Metrics | None


def require_known_classes(workspace: Workspace, rules: RetrainParams, log: Path, emit: Emit) -> None:
    """Stop before a training whose model could not be compared with the champion, for want of some of its classes.

    Which classes may come is said by ``inbox.classes``: none (``fixed``) or new ones (``grow``); or all of it by
    ``prepare.expected_classes``. Data without any of the champion's classes are another task, which is meant.

    Raises:
        NightlyError: names the classes and what allows them.
    """
    settings, model_id = read_settings(workspace.params), registry.champion_id(workspace.models)
    prepared = workspace.prepared / "classes.json"
    if model_id is None or settings["prepare"].expected_classes is not None or not prepared.is_file():
        return
    champion = _present_tonight(workspace, model_id, rules, log, emit)
    now, before = read_json(prepared), load_bundle(champion).classes
    gone, new = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
    if len(new) == len(now) or not (gone or (new and settings["inbox"].classes == "fixed")):
        return
    words = [f"{', '.join(names)} {what}" for names, what in ((gone, "gone"), (new, "new")) if names]
    raise NightlyError(
        f"the classes are not those of the model in service, {model_id}: {'; '.join(words)}. Bring images of what "
        "is gone back; 'inbox.classes: grow' allows new ones, and 'prepare.expected_classes' with every name anything"
    )


def judge_exported(workspace: Workspace, rules: RetrainParams, log: Path, emit: Emit) -> Judgement:
    """Judge ``models/exported`` against the champion, measured anew on another test set or without its predictions."""
    engines = load_bundle(workspace.exported).engines
    offered = tuple(name for name, facts in engines.items() if facts.get("offered"))
    challenger = judge.read_evaluation(workspace.evaluation, offered)
    champion_id = registry.champion_id(workspace.models)
    champion = None
    if champion_id is not None:
        path = _present_tonight(workspace, champion_id, rules, log, emit)
        champion = judge.read_evaluation(path / "evaluation")
        if reason := _not_to_be_paired(challenger, champion):
            emit(f"{reason}: measuring the champion {champion_id} on today's test set")
            test_digest = challenger.metrics["test_digest"]
            limit_seconds = rules.stage_time_limit_hours * 3600
            champion = _measured_anew(workspace, path, test_digest, log, emit, limit_seconds) or champion
    verdict = judge.judge(challenger, champion, rules)
    if verdict.action == "promote":
        verdict = _respect_rollback(workspace, challenger.id, verdict) or verdict
    return Judgement(verdict, challenger.metrics, champion.metrics if champion else None)


def _not_to_be_paired(challenger: Evaluated, champion: Evaluated) -> str | None:
    """Return why the champion must be measured anew, None if it need not or if that would change nothing."""
    if set(champion.metrics["per_class"]) != set(challenger.metrics["per_class"]):
        return None
    if champion.metrics["test_digest"] != challenger.metrics["test_digest"]:
        return "the test set has changed"
    if champion.correct is None and champion.id != challenger.id:
        return "the champion's predictions are missing"
    return None


def _respect_rollback(workspace: Workspace, model_id: str, verdict: Verdict) -> Verdict | None:
    """Hold a model that was there when a person put another one back: its figures were better then, too."""
    choice = ledger.withdrawal(workspace.models, model_id)
    if choice is None:
        return None
    by_hand = f"put it in service by hand with 'nightly promote {model_id}'"
    what = "rolled back" if choice.champion_before == model_id else f"known when {choice.id} was put back"
    reason = f"{what} on {choice.time[:10]} ({'; '.join(choice.reasons)})"
    return Verdict("hold", [reason, by_hand], verdict.comparison)


def carry_out(workspace: Workspace, judgement: Judgement, patience_seconds: float, emit: Emit) -> None:
    """Promote or hold the model in ``models/exported``, as judged.

    Holding the champion itself is no decision, nor is holding the same model once more for the same reasons, so
    the ledger does not hear of nights without news.
    """
    models, verdict, model_id = workspace.models, judgement.verdict, judgement.challenger["model_id"]
    if verdict.action == "promote":
        _register(workspace, patience_seconds, emit)
        ledger.promote(models, model_id, verdict, judgement.champion)
    elif model_id != registry.champion_id(models) and not _said_already(models, model_id, verdict):
        digest = read_json(workspace.exported / "bundle.json")["data_digest"]
        ledger.hold(models, verdict, judgement.challenger, judgement.champion, digest)


def _said_already(models: Path, model_id: str, verdict: Verdict) -> bool:
    last = ledger.history(models)[-1:]
    return [(entry.action, entry.id, entry.reasons) for entry in last] == [("hold", model_id, verdict.reasons)]


def promote_by_hand(workspace: Workspace, model_id: str, reason: str, emit: Emit) -> Entry:
    """Put a registered model, or the last exported one, in service whatever its accuracy.

    Raises:
        NightlyError: it is in service already, or there is no such model.
    """
    if registry.champion_id(workspace.models) == model_id:
        raise NightlyError(f"{model_id} is the champion already")
    if model_id not in registry.registered(workspace.models) and _exported_id(workspace) == model_id:
        _register(workspace, 0.0, emit)
    _present(workspace, model_id, workspace.state / "logs" / "promote.log", emit)
    return ledger.promote(workspace.models, model_id, Verdict("promote", [reason]))


def roll_back(workspace: Workspace, model_id: str | None, reason: str, emit: Emit) -> Entry:
    """Put ``model_id`` (None: the champion's predecessor) back in service, fetching it if it was pruned."""
    target = model_id or ledger.rollback_target(workspace.models)
    if _current(workspace) == target:
        raise NightlyError(f"{target} is the champion already")
    _present(workspace, target, workspace.state / "logs" / "rollback.log", emit)
    return ledger.rollback(workspace.models, target, reason)


def _current(workspace: Workspace) -> str | None:
    try:
        return registry.champion_id(workspace.models)
    except NightlyError:  # damaged: a rollback to a named model mends it
        return None


def _exported_id(workspace: Workspace) -> str | None:
    facts = workspace.exported / "bundle.json"
    return read_json(facts)["id"] if facts.is_file() else None


def _register(workspace: Workspace, patience_seconds: float, emit: Emit) -> None:
    model_id = ledger.register(workspace.exported, workspace.evaluation, workspace.registry)
    stages.track(workspace.root, workspace.registry / model_id, patience_seconds, emit)


def _present_tonight(workspace: Workspace, model_id: str, rules: RetrainParams, log: Path, emit: Emit) -> Path:
    limits = (rules.stage_time_limit_hours * 3600, rules.dvc_patience_minutes * 60)
    return _present(workspace, model_id, log, emit, *limits)


def _present(
    workspace: Workspace,
    model_id: str,
    log: Path,
    emit: Emit,
    limit_seconds: float | None = None,
    patience_seconds: float = 0.0,
) -> Path:
    """Return a registered model's directory, fetched from DVC's storage if it was pruned."""
    path = workspace.registry / model_id
    if not path.is_dir() and path.with_name(f"{model_id}.dvc").is_file():
        emit(f"fetching {model_id} from DVC's storage")
        limits = {"limit_seconds": limit_seconds, "patience_seconds": patience_seconds}
        storage.fetch(workspace.root, path, log=log, emit=emit, **limits)
    return registry.registered_path(workspace.models, model_id)


def _measured_anew(
    workspace: Workspace, path: Path, test_digest: str, log: Path, emit: Emit, limit_seconds: float
) -> Evaluated | None:
    """Return the champion's evaluation on today's test set, None if it can't be measured on it."""
    out = workspace.state / "champion-evaluation"
    if (out / "metrics.json").is_file():
        known = judge.read_evaluation(out)
        if (known.id, known.metrics["test_digest"]) == (path.name, test_digest):
            return known
    command = [sys.executable, "-m", "tasks.evaluate", "--exported", str(path), "--prepared", str(workspace.prepared)]
    command += ["--out", str(out), "--params", str(workspace.params)]
    try:
        child.run(command, name="judge", root=workspace.root, log=log, emit=emit, limit_seconds=limit_seconds)
    except StageFailed as failure:
        emit(f"the champion can't be measured on it: {failure}")
        return None
    return judge.read_evaluation(out)
