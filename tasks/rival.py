"""The model in service, as it stood when another one was evaluated: the report shows both side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import NightlyError
from tasks.judge import Evaluated, Metrics, compare, incomparable, read_evaluation
from tasks.registry import champion_id, registered_path


@dataclass(frozen=True)
class Rival:
    """The model in service.

    Attributes:
        metrics: its metrics.json; empty where it can't be read.
        comparison: what ``tasks.judge.compare`` finds, the new model being the challenger; None if it can't.
        obstacle: why they can't, in words.
    """

    id: str
    metrics: Metrics
    comparison: dict[str, Any] | None = None
    obstacle: str = ""


def read_rival(models: Path, challenger: Evaluated) -> Rival | None:
    """Return the model in service with its figures; None if there is none, or if it is ``challenger`` itself."""
    model_id = champion_id(models)
    if model_id in (None, challenger.id):
        return None
    try:
        champion = read_evaluation(registered_path(models, model_id) / "evaluation")
    except NightlyError as error:  # pruned, or not pulled yet; the judge fetches it, an evaluation has no need to
        return Rival(model_id, {}, obstacle=str(error))
    if obstacle := incomparable(challenger.metrics, champion.metrics):
        return Rival(model_id, champion.metrics, obstacle=obstacle)
    # Which lost classes would hold it is for the judge's parameters to say.
    return Rival(model_id, champion.metrics, compare(challenger, champion, class_recall_tolerance=1.0))
