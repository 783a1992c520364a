"""Classify a folder as a Prefect flow; the retraining flow ends with the same task."""

import sys
from datetime import datetime
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows import child
from flows.console import shorten_expected_errors
from flows.summary import Predictions
from flows.workspace import Workspace, find_workspace
from tasks.errors import NightlyError
from tasks.files import read_json
from tasks.registry import champion_id, champion_path

shorten_expected_errors()


def run_id() -> str:
    """Return this moment as a name for folders."""
    return f"{datetime.now():%Y%m%d-%H%M%S}"


@task(name="predict", task_run_name="predict", cache_policy=NO_CACHE, persist_result=False)
def classify(
    workspace: Workspace, run: str, source: Path, model: Path | None = None, limit_hours: float | None = None
) -> Predictions:
    """Classify ``source`` in a process of its own, so that its memory is given back.

    Args:
        model: a bundle's directory; None takes the model in service.
    """
    out = workspace.predictions / run
    shown = workspace.shown(source)
    command = [sys.executable, "-m", "tasks.predict", str(source), "--out", str(out)]
    command += ["--model", str(model or champion_path(workspace.models)), "--params", str(workspace.params)]
    child.run(
        command,
        name="predict",
        root=workspace.root,
        log=workspace.state / "logs" / run / "predict.log",
        emit=get_run_logger().info,
        limit_seconds=limit_hours * 3600 if limit_hours else None,
    )
    facts = read_json(out / "summary.json")
    good = facts["statuses"].get("ok", 0)
    return Predictions(
        note=f"{good:,} of {facts['files']:,} files in {shown} classified with {facts['engine']}",
        table=workspace.shown(out / "predictions.parquet"),
        facts=facts,
    )


@task(name="predict", task_run_name="predict", cache_policy=NO_CACHE, persist_result=False)
def nothing_to_classify(reason: str) -> State:
    """Show in the run that no folder was classified, and why."""
    get_run_logger().info("skipped: %s", reason)
    return Completed(name="Skipped", message=reason)


def obstacle(workspace: Workspace, source: Path, chosen: bool) -> str | None:
    """Return why there is nothing to classify at the end of a night, None if there is.

    Args:
        chosen: somebody asked for this very folder, so that its absence is an error and no reason to skip.
    """
    from tasks.predict import find_files

    if champion_id(workspace.models) is None:
        return "no model is in service yet"
    if not chosen and not (source.is_dir() and find_files(source)[0]):
        return f"{workspace.shown(source)} holds no images"
    return None


@flow(name="predict", flow_run_name=lambda: f"predict {datetime.now():%Y-%m-%d %H:%M:%S}", persist_result=False)
def predict(source: Path | None = None, model: Path | None = None) -> Predictions:
    """Classify a folder of images (data/incoming unless another is given) with the model in service."""
    workspace = find_workspace()
    folder = workspace.root / (source or workspace.incoming)
    if not folder.exists():
        raise NightlyError(f"there is nothing at '{folder}': give a folder of images")
    return classify(workspace, run_id(), folder, model)
