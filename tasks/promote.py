"""Which model is in service: the registry, the champion's pointer and the ledger.

Every change runs in the same order: the model's directory in the registry, the line in the ledger, the
pointer. Each step is atomic, so a kill anywhere leaves either the old or the new champion in service.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tasks.bundle import load_bundle
from tasks.errors import NightlyError
from tasks.files import append_line, publish_directory, write_json, write_text
from tasks.judge import Metrics, Verdict, read_metrics
from tasks.registry import champion_id, registered_path

Action = Literal["promote", "hold", "rollback"]

#: What goes with a model from its evaluation into the registry.
EVALUATION_FILES = ("metrics.json", "predictions.parquet", "report.html")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        time: UTC, ISO 8601.
        champion_before: id of the model in service until then; None if there was none.
        challenger: metrics of model ``id``; None where it was never evaluated.
        champion: metrics of ``champion_before`` that ``challenger`` was compared with.
        comparison: what ``tasks.judge.compare`` found; None where nothing was compared, and in older lines.
    """

    time: str
    action: Action
    id: str
    champion_before: str | None
    reasons: list[str]
    challenger: Metrics | None = None
    champion: Metrics | None = None
    data_digest: str | None = None
    comparison: dict[str, Any] | None = None


def register(exported: Path, evaluation: Path, registry: Path) -> str:
    """Copy an exported model and its evaluation into ``registry``, with a card about both; return its id.

    The copy's engines also have the evaluation's evidence, and one that failed on the test split is not offered. A
    model that is registered already stays untouched.

    Raises:
        NightlyError: ``exported`` is no complete bundle, or ``evaluation`` is of another model.
    """
    from tasks.modelcard import CARD, render_card  # not for those who only read the ledger

    bundle = load_bundle(exported)
    metrics = read_metrics(evaluation)
    if metrics["model_id"] != bundle.id:
        raise NightlyError(f"{evaluation} is about model {metrics['model_id']}, but {exported} holds {bundle.id}")
    destination = registry / bundle.id
    if not destination.exists():
        with publish_directory(destination) as partial:
            shutil.copytree(exported, partial, dirs_exist_ok=True)
            bundle = bundle.changed(path=partial, engines=_tested(bundle.engines, metrics.get("engines", {})))
            bundle.save()
            write_text(partial / CARD, render_card(bundle, metrics))
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
    return _put_in_service(models, "promote", model_id, verdict.reasons, champion_metrics, verdict.comparison)


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
        comparison=verdict.comparison,
    )
    _append(models, entry)
    return entry


def rollback(models: Path, model_id: str, reason: str) -> Entry:
    """Put the registered model ``model_id`` back in service."""
    return _put_in_service(models, "rollback", model_id, [reason])


def withdrawal(models: Path, model_id: str) -> Entry | None:
    """Return the rollback by which a person chose another model although this one was known, None if there is none.

    It was in service then, or had been judged. Put in service by hand since, it counts as chosen.
    """
    found, known = None, False
    for entry in history(models):
        known |= model_id in (entry.id, entry.champion_before)
        if entry.action != "hold" and entry.id == model_id:
            found = None
        elif entry.action == "rollback" and known:
            found = entry
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


def _put_in_service(
    models: Path,
    action: Action,
    model_id: str,
    reasons: list[str],
    champion: Metrics | None = None,
    comparison: dict[str, Any] | None = None,
) -> Entry:
    path = registered_path(models, model_id)
    # Typed by people: bytes that are no UTF-8 are written as what can be stored and printed.
    reasons = [reason.encode("utf-8", "backslashreplace").decode() for reason in reasons]
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
        champion=champion,
        data_digest=load_bundle(path).data_digest,
        comparison=comparison,
    )
    _append(models, entry)
    write_json(models / "champion.json", {"id": model_id, "promoted": entry.time, "reason": "; ".join(reasons)})
    return entry


def _append(models: Path, entry: Entry) -> None:
    append_line(models / "ledger.jsonl", json.dumps(vars(entry), ensure_ascii=False, allow_nan=False))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
