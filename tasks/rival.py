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
        id: None where the file that names it is damaged.
        metrics: its metrics.json; empty where it can't be read.
        comparison: what ``tasks.judge.compare`` finds, the new model being the challenger; None if it can't.
        obstacle: why they can't, in words.
    """

    id: str | None
    metrics: Metrics
    comparison: dict[str, Any] | None = None
    obstacle: str = ""


def read_rival(models: Path, challenger: Evaluated) -> Rival | None:
    """Return the model in service with its figures; None if there is none, or if it is ``challenger`` itself.

    Whatever is wrong with it is an obstacle and no error: the new model has been measured by then.
    """
    try:
        model_id = champion_id(models)
    except NightlyError as error:
        return Rival(None, {}, obstacle=str(error))
    if model_id in (None, challenger.id):
        return None
    try:
        champion = read_evaluation(registered_path(models, model_id) / "evaluation")
    except NightlyError as error:  # pruned, or not pulled yet; the judge fetches it, an evaluation has no need to
        return Rival(model_id, {}, obstacle=str(error))
    except ValueError:  # no JSON, no Parquet
        return Rival(model_id, {}, obstacle=f"{models / 'registry' / model_id / 'evaluation'} is damaged")
    if obstacle := incomparable(challenger.metrics, champion.metrics):
        return Rival(model_id, champion.metrics, obstacle=obstacle)
    # Which lost classes would hold it is for the judge's parameters to say.
    return Rival(model_id, champion.metrics, compare(challenger, champion, class_recall_tolerance=1.0))
