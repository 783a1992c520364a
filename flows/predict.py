"""Classify a folder as a Prefect flow; the retraining flow ends with the same task."""

import contextlib
import json
import sys
import tempfile
from datetime import datetime
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows import child
from flows.console import shorten_expected_errors
from flows.runs import recorded
from flows.summary import Predictions
from flows.workspace import Workspace, find_workspace
from tasks.errors import NightlyError
from tasks.files import write_json
from tasks.params import parse_section, read_params_file
from tasks.registry import champion_id, champion_path
from tasks.store import is_remote, open_store

shorten_expected_errors()


def run_id() -> str:
    """Return this moment as a name for folders."""
    return f"{datetime.now():%Y%m%d-%H%M%S}"


@task(name="predict", task_run_name="predict", cache_policy=NO_CACHE, persist_result=False)
def classify(
    workspace: Workspace,
    run: str,
    source: Path | str,
    model: Path | None = None,
    limit_hours: float | None = None,
    *,
    out: str | None = None,
    params: Path | None = None,
    fresh: bool = False,
    grace_seconds: float = 20.0,
) -> Predictions:
    """Classify ``source`` in a process of its own, so that its memory is given back.

    Args:
        model: a bundle's directory; None takes the model in service.
        out: a directory or an fsspec address; None takes data/predictions/<run>.
        params: a file with a section ``predict``; None takes params.yaml.
        fresh: forget an unfinished result.
    """
    out = out or str(workspace.predictions / run)
    command = [sys.executable, "-m", "tasks.predict", str(source), "--out", out]
    command += ["--model", str(model or champion_path(workspace.models)), "--params", str(params or workspace.params)]
    command += ["--fresh"] if fresh else []
    child.run(
        command,
        name="predict",
        root=workspace.root,
        log=workspace.state / "logs" / run / "predict.log",
        emit=get_run_logger().info,
        limit_seconds=limit_hours * 3600 if limit_hours else None,
        grace_seconds=grace_seconds,
    )
    return outcome(workspace, str(source), out)


def outcome(workspace: Workspace, source: str, out: str) -> Predictions:
    """Return what the summary of a complete result says."""
    facts = json.loads(open_store(out).read("summary.json") or b"")
    good = facts["statuses"].get("ok", 0)
    shown = source if is_remote(source) else workspace.shown(Path(source))
    table = f"{out.rstrip('/')}/predictions.parquet"
    return Predictions(
        note=f"{good:,} of {facts['files']:,} files in {shown} classified with {facts['engine']}",
        table=table if is_remote(out) else workspace.shown(Path(table)),
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
    if champion_id(workspace.models) is None:
        return "no model is in service yet"
    if not chosen and not (source.is_dir() and holds_images(source)):
        return f"{workspace.shown(source)} holds no images"
    return None


def holds_images(folder: Path) -> bool:
    """Tell whether there is anything to classify in a folder."""
    from tasks.inputs import open_input

    # A folder needs no room of its own.
    with contextlib.closing(open_input(str(folder), Path(tempfile.gettempdir()))) as files:
        return bool(files.find().paths)


@flow(name="predict", flow_run_name=lambda: f"predict {datetime.now():%Y-%m-%d %H:%M:%S}", persist_result=False)
def predict(
    source: Path | str | None = None,
    out: str | None = None,
    model: Path | None = None,
    on: Literal["process", "threads", "dask", "ray"] = "process",
    address: str | None = None,
    workers: int | None = None,
    options: dict[str, Any] | None = None,
    fresh: bool = False,
) -> Predictions:
    """Classify images, on one machine or on many; the same call goes on with what an earlier one left undone.

    On several machines, source, out and model must be the same files on each: on shared storage or at an address
    such as s3://bucket/prefix, and PREFECT_API_URL must name a server that all of them reach.

    Args:
        source: a folder, searched recursively; an image; a pattern; a .txt of paths; a tar or zip archive; or an
            address. data/incoming unless another is given.
        out: a folder or an address for the result; one in data/predictions unless another is given.
        model: a model's folder; the model in service unless another is given.
        on: where the images are classified: in a process of its own, on threads of this one, on Dask or on Ray.
        address: a Dask scheduler's or Ray head's; without one, processes of this machine.
        workers: of this machine, how many threads or processes.
        options: what is to differ from the section 'predict' of params.yaml.
        fresh: forget an unfinished result.
    """
    workspace, run = find_workspace(), run_id()
    place = str(source or workspace.incoming)
    if place == "-":
        raise NightlyError("source '-' is for the command line: give a flow a text file of paths")
    if not is_remote(place):
        place = str(workspace.root / place)
        if not Path(place).exists() and not has_magic(place):
            raise NightlyError(f"there is nothing at '{place}': give a folder of images, or another kind of source")
    if out is None:
        from tasks.predict import choose_out

        out = str(choose_out(workspace.predictions, place))
    elif not is_remote(out):
        out = str(workspace.root / out)
    model = workspace.root / model if model else champion_path(workspace.models)
    with recorded(workspace, alone=False):
        if on == "process":
            if address or workers:
                raise NightlyError("'address' and 'workers' are for on='threads', 'dask' or 'ray', but on is 'process'")
            return classify(
                workspace, run, place, model, out=out, params=with_options(workspace, run, options), fresh=fresh
            )

        from flows import runners
        from tasks.outcome import PredictParams
        from tasks.predict import predict as classify_all

        runners.require(on, address, workers)
        values = read_params_file(workspace.params).get("predict") or {}
        params = parse_section(values | (options or {}), "predict", PredictParams, workspace.params)
        compute = partial(runners.run_shards, on, address, workers)
        summary = classify_all(place, out, model, params, fresh=fresh, compute=compute)
        done = outcome(workspace, place, out)
        for line in (done.note, *(summary.drift or {}).get("sentences", [])):
            get_run_logger().info(line)
        return done


def with_options(workspace: Workspace, run: str, options: dict[str, Any] | None) -> Path:
    """Return a parameter file whose section ``predict`` has ``options`` in place of its own."""
    if not options:
        return workspace.params
    changed = workspace.state / "logs" / run / "params.yaml"
    section = (read_params_file(workspace.params).get("predict") or {}) | options
    write_json(changed, {"predict": section})  # which is YAML, too
    return changed
