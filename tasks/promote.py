"""Which model is in service: judging a challenger, the registry, the champion's pointer and the ledger.

Every change runs in the same order: the model's directory in the registry, the line in the ledger, the
pointer. Each step is atomic, so a kill anywhere leaves either the old or the new champion in service.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tasks.bundle import load_bundle
from tasks.errors import NightlyError
from tasks.files import publish_directory, read_json, write_json
from tasks.registry import champion_id, registered_path

Metrics = dict[str, Any]
Action = Literal["promote", "hold", "rollback"]

#: What goes with a model from its evaluation into the registry.
EVALUATION_FILES = ("metrics.json", "report.html")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger goes into service, and why, in words."""

    action: Literal["promote", "hold"]
    reasons: list[str]


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        time: UTC, ISO 8601.
        champion_before: id of the model in service until then; None if there was none.
        challenger: metrics of model ``id``; None where it was never evaluated.
        champion: metrics of ``champion_before`` that ``challenger`` was compared with.
    """

    time: str
    action: Action
    id: str
    champion_before: str | None
    reasons: list[str]
    challenger: Metrics | None = None
    champion: Metrics | None = None
    data_digest: str | None = None


def judge(challenger: Metrics, champion: Metrics | None, minimum_gain: float, accuracy_floor: float) -> Verdict:
    """Decide whether ``challenger`` replaces ``champion``.

    Args:
        challenger: the content of its ``metrics.json``.
        champion: the same for the model in service, measured on the same test set; None for the first model.
        minimum_gain: accuracy that the challenger must win by, 0..1.
        accuracy_floor: accuracy under which no model goes into service, 0..1.
    """
    accuracy = challenger["accuracy"]
    if champion is not None and champion["model_id"] == challenger["model_id"]:
        return Verdict("hold", [f"{challenger['model_id']} is the champion already"])
    if accuracy < accuracy_floor:
        return Verdict("hold", [f"accuracy {accuracy:.2%} is under the floor of {accuracy_floor:.2%}"])
    if champion is None:
        return Verdict("promote", [f"the first model, and its accuracy of {accuracy:.2%} is over the floor"])
    if obstacle := incomparable(challenger, champion):
        by_hand = f"put it in service by hand with 'nightly promote {challenger['model_id']}'"
        return Verdict("hold", [obstacle, f"if it is the one you want, {by_hand}"])
    # Rounded, because 0.938 - 0.937 is a little less than 0.001 in binary.
    gain = round(accuracy - champion["accuracy"], 9)
    difference = f"{abs(gain) * 100:.2f} points"
    if gain > 0 and gain >= minimum_gain:
        return Verdict("promote", [f"better than the champion on the frozen test set by {difference}"])
    if gain > 0:
        wanted = f"{minimum_gain * 100:.2f} points are wanted"
        return Verdict("hold", [f"better than the champion on the frozen test set by {difference} only; {wanted}"])
    if gain == 0:
        return Verdict("hold", ["as good as the champion on the frozen test set, and no better"])
    return Verdict("hold", [f"worse than the champion on the frozen test set by {difference}"])


def incomparable(challenger: Metrics, champion: Metrics) -> str | None:
    """Return why the two accuracies may not be compared, or None if they may."""
    new, old = set(challenger["per_class"]), set(champion["per_class"])
    if new != old:
        changes = [f"{sign}{name}" for sign, names in (("+", new - old), ("-", old - new)) for name in sorted(names)]
        return f"its classes differ from the champion's ({', '.join(changes)}), so the two can't be compared"
    if challenger["test_digest"] != champion["test_digest"]:
        return "the champion was measured on another test set, so the two can't be compared"
    return None


def register(exported: Path, evaluation: Path, registry: Path) -> str:
    """Copy an exported model and its evaluation into ``registry``; return its id.

    The copy's engines also have the evaluation's evidence, and one that failed on the test split is not offered. A
    model that is registered already stays untouched.

    Raises:
        NightlyError: ``exported`` is no complete bundle, or ``evaluation`` is of another model.
    """
    bundle = load_bundle(exported)
    metrics = read_metrics(evaluation)
    if metrics["model_id"] != bundle.id:
        raise NightlyError(f"{evaluation} is about model {metrics['model_id']}, but {exported} holds {bundle.id}")
    destination = registry / bundle.id
    if not destination.exists():
        with publish_directory(destination) as partial:
            shutil.copytree(exported, partial, dirs_exist_ok=True)
            bundle.changed(path=partial, engines=_tested(bundle.engines, metrics.get("engines", {}))).save()
            (partial / "evaluation").mkdir(exist_ok=True)
            for name in EVALUATION_FILES:
                shutil.copyfile(evaluation / name, partial / "evaluation" / name)
    return bundle.id


def _tested(engines: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what is known of the engines, with what was found on the test split."""
    return {
        name: {**facts, "offered": facts["offered"] and found[name].get("passed", True), "test": found[name]}
        if name in found
        else facts
        for name, facts in engines.items()
    }


def promote(models: Path, model_id: str, verdict: Verdict, champion_metrics: Metrics | None = None) -> Entry:
    """Put the registered model ``model_id`` in service.

    Args:
        models: the directory with ``registry/``, ``ledger.jsonl`` and ``champion.json``.
        champion_metrics: what the challenger was compared with, for the ledger.
    """
    return _put_in_service(models, "promote", model_id, verdict.reasons, champion_metrics)


def hold(models: Path, verdict: Verdict, challenger: Metrics, champion: Metrics | None, data_digest: str) -> Entry:
    """Write into the ledger that a challenger was not promoted."""
    entry = Entry(
        time=_now(),
        action="hold",
        id=challenger["model_id"],
        champion_before=champion_id(models),
        reasons=verdict.reasons,
        challenger=challenger,
        champion=champion,
        data_digest=data_digest,
    )
    _append(models / "ledger.jsonl", entry)
    return entry


def rollback(models: Path, model_id: str, reason: str) -> Entry:
    """Put the registered model ``model_id`` back in service."""
    return _put_in_service(models, "rollback", model_id, [reason], None)


def withdrawal(models: Path, model_id: str) -> Entry | None:
    """Return the rollback that took a model out of service, None if it never was or is back since."""
    found = None
    for entry in history(models):
        if entry.action == "rollback" and entry.champion_before == model_id:
            found = entry
        elif entry.action != "hold" and entry.id == model_id:
            found = None
    return found


def rollback_target(models: Path) -> str:
    """Return the id of the model that was in service before the champion was promoted.

    Only promotions count, so a second rollback goes further back and not forward again.

    Raises:
        NightlyError: there is no champion, or none before it.
    """
    current = champion_id(models)
    if current is None:
        raise NightlyError("no model is in service, so there is nothing to roll back")
    for entry in reversed(history(models)):
        if entry.action == "promote" and entry.id == current and entry.champion_before != current:
            if entry.champion_before is None:
                break
            return entry.champion_before
    raise NightlyError(f"{current} is the first champion: there is no earlier one to roll back to")


def history(models: Path) -> list[Entry]:
    """Return the ledger's entries, oldest first; a line that a crash tore is left out."""
    ledger = models / "ledger.jsonl"
    if not ledger.exists():
        return []
    entries = []
    for number, line in enumerate(ledger.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entries.append(Entry(**json.loads(line)))
        except (ValueError, TypeError):
            logger.warning("%s: line %d is damaged and was left out", ledger, number)
    return entries


def read_metrics(evaluation: Path) -> Metrics:
    """Return ``metrics.json`` of an evaluation directory."""
    path = evaluation / "metrics.json"
    if not path.is_file():
        raise NightlyError(f"{path} is missing: run 'nightly retrain' to evaluate the model")
    return read_json(path)


def _put_in_service(
    models: Path, action: Action, model_id: str, reasons: list[str], champion_metrics: Metrics | None
) -> Entry:
    path = registered_path(models, model_id)
    try:
        before = champion_id(models)
    except NightlyError:  # a damaged pointer is what this very call mends
        before = None
    entry = Entry(
        time=_now(),
        action=action,
        id=model_id,
        champion_before=before,
        reasons=reasons,
        challenger=read_metrics(path / "evaluation"),
        champion=champion_metrics,
        data_digest=load_bundle(path).data_digest,
    )
    _append(models / "ledger.jsonl", entry)
    write_json(models / "champion.json", {"id": model_id, "promoted": entry.time, "reason": "; ".join(reasons)})
    return entry


def _append(ledger: Path, entry: Entry) -> None:
    """Add one line with one write, on a line of its own even if a crash tore the last one."""
    line = json.dumps(vars(entry), ensure_ascii=False, allow_nan=False) + "\n"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())
        os.fsync(file.fileno())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
