"""What killed runs left behind, put right at the start of the next one, and only what is proven to be dead.

Whoever holds the workspace lock knows that no other run is at work in it.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows import stages
from flows.notify import nights, record_night
from flows.runs import Run, process_mark, recorded_runs, runs_folder, started_after
from flows.workspace import Workspace
from tasks.errors import NightlyError, describe
from tasks.files import tidy_up
from tasks.registry import champion_id

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

#: How long a run may take to get hold of the workspace, and to tell the server when it has left it.
REPORTING_TIME = timedelta(minutes=10)
#: How long the states of its tasks may take to reach the server after a run has ended.
QUEUE_TIME = timedelta(seconds=30)
_ASIDE = re.compile(r"\.(?P<name>.+)\.(?:partial|old)-(?P<pid>\d+)")


def reconcile(workspace: Workspace, emit: Callable[[str], None]) -> list[str]:
    """Put right what killed runs left behind; return the lines that say what, which ``emit`` got, too.

    The caller holds the workspace lock. What cannot be put right is said, and stops nobody.
    """
    lines = []
    for step in (tidied, mended_dvc, mended_runs, left_predictions):
        try:
            for line in step(workspace):
                lines.append(line)
                emit(line)
        except (NightlyError, OSError) as error:
            lines.append(f"could not be put right: {describe(error)}")
            emit(lines[-1])
    return lines


# --- our files


def leftovers(workspace: Workspace) -> list[Path]:
    """Return what dead processes wrote aside and never put in its place."""
    found = [
        path
        for folder in _folders(workspace)
        for path in folder.glob(".*-*")
        if (match := _ASIDE.fullmatch(path.name)) and process_mark(int(match["pid"])) is None
    ]
    return sorted(found)


def tidied(workspace: Workspace) -> Iterator[str]:
    """Remove the leftovers, or put back what was moved aside."""
    for path in leftovers(workspace):
        match = _ASIDE.fullmatch(path.name)
        assert match
        destination = path.with_name(match["name"])
        missing = not destination.exists()
        tidy_up(destination)
        if missing and destination.exists():
            yield f"put back {workspace.shown(destination)}, which a killed run had moved aside"
        elif not path.exists():
            yield f"removed {workspace.shown(path)}, which a killed run left behind"


def _folders(workspace: Workspace) -> Iterable[Path]:
    """Return the folders that this software writes in; the users' own are not among them."""
    data, models = workspace.root / "data", workspace.models
    return (
        *(workspace.root, data, data / "additions", workspace.predictions),
        *(models, workspace.registry, workspace.evaluation, workspace.evaluation / "plots"),
        *(workspace.state, runs_folder(workspace)),
    )


def left_predictions(workspace: Workspace) -> Iterator[str]:
    """Remove what killed nights left of predictions that later ones made anew; say which others are hopeless.

    One that no later night has made anew serves the next one, see ``tasks.plan.adopt``. What people began is theirs.
    """
    begun = {record.run for record in nights(workspace)}
    newest = max((folder.name for folder in workspace.predictions.glob("[0-9]*-[0-9]*")), default="")
    for folder in sorted(workspace.predictions.glob(".[0-9]*-[0-9]*.unfinished")):
        run = folder.name.removeprefix(".").removesuffix(".unfinished")
        if run in begun and run < newest:
            shutil.rmtree(folder)
            yield f"removed {workspace.shown(folder)}, which a killed run left behind"
    yield from hopeless_predictions(workspace)


def hopeless_predictions(workspace: Workspace) -> Iterator[str]:
    """Say which unfinished predictions no later run will go on with, and why."""
    unfinished = sorted(workspace.predictions.glob(".*.unfinished"))
    if not unfinished:
        return
    from tasks.plan import read_plan
    from tasks.store import LocalStore, is_remote

    champion = champion_id(workspace.models)
    for folder in unfinished:
        plan = read_plan(LocalStore(folder))
        source = plan.identity["source"] if plan else ""
        if plan is None:
            reason = "it has no plan to go on with"
        elif source != "-" and not is_remote(source) and not os.path.exists(source):
            reason = f"its images in {source} are gone"
        elif plan.identity["model"] != champion:
            reason = f"its model {plan.identity['model']} is not in service any more"
        else:
            continue
        yield f"{workspace.shown(folder)} was never finished and will not be: {reason}"


# --- DVC's files, which it writes in place: a kill in the middle tears them, and then no command of it works any more


def mended_dvc(workspace: Workspace) -> Iterator[str]:
    """Put right what a killed DVC left torn or locked."""
    root = workspace.root
    with _notes_guarded(root) as mine:
        if mine and (reason := stale_notes(root)):
            _notes(root).unlink()
            yield f"removed DVC's notes on who is at work: {reason}"
    lock = root / "dvc.lock"
    if lock.exists() and not is_lock_file(lock):
        lock.replace(workspace.state / "dvc.lock.torn")
        yield "set a torn dvc.lock aside: what it said is restored from DVC's run cache"
    for pointer in torn_pointers(workspace):
        content = pointer.with_suffix("")
        if content.exists():
            pointer.unlink()
            stages.track(root, content)
            yield f"wrote a torn {workspace.shown(pointer)} anew"
        else:
            yield f"{workspace.shown(pointer)} is torn and what it points to is gone: git has the last good one"


def torn_pointers(workspace: Workspace) -> list[Path]:
    """Return the ``.dvc`` files of models and additions that say nothing."""
    folders = (workspace.registry, workspace.root / "data" / "additions")
    return [path for folder in folders for path in sorted(folder.glob("*.dvc")) if read_pointer(path) is None]


def read_pointer(path: Path) -> str | None:
    """Return the digest in a ``.dvc`` file, None if it is torn."""
    try:
        [out] = yaml.safe_load(path.read_text(encoding="utf-8"))["outs"]
        return out["md5"] if out["path"] == path.stem else None
    except (yaml.YAMLError, ValueError, KeyError, TypeError):
        return None


def is_lock_file(path: Path) -> bool:
    """Tell whether a ``dvc.lock`` is such that DVC reads it."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        lists = [stage.get(key, []) for stage in content["stages"].values() for key in ("deps", "outs")]
        params = [values for stage in content["stages"].values() for values in stage.get("params", {}).values()]
        return (
            text.endswith("\n")
            and isinstance(content["schema"], str)
            and all("cmd" in stage for stage in content["stages"].values())
            and all(isinstance(items, list) and all("path" in item for item in items) for items in lists)
            and all(isinstance(values, dict) for values in params)
        )
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return False


def stale_notes(root: Path) -> str | None:
    """Return why nobody is at work although DVC's notes may say so; None if there is no such reason.

    DVC forgets processes that are gone by itself, but of the others it asks for no more than the number.
    """
    try:
        written = _notes(root).stat().st_mtime
        notes = json.loads(_notes(root).read_text(encoding="utf-8"))
        readers = [holder for holders in notes.get("read", {}).values() for holder in holders]
        pids = {int(holder["pid"]) for holder in [*notes.get("write", {}).values(), *readers]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return "they are torn"
    there = {pid for pid in pids if process_mark(pid) is not None}
    others = {pid for pid in there if started_after(pid, written) and not _is_dvc(pid)}
    if others and others == there:
        return f"process {min(others)} is another one than it was"
    return None


def _notes(root: Path) -> Path:
    return root / ".dvc" / "tmp" / "rwlock"


@contextmanager
def _notes_guarded(root: Path) -> Iterator[bool]:
    """Keep DVC from writing its notes meanwhile, as it does itself; yield whether that worked, without waiting."""
    lock = root / ".dvc" / "tmp" / "rwlock.lock"
    if not lock.exists():
        yield False
        return
    with lock.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_dvc(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(Path(word).name == "dvc" for word in words)


# --- flow runs on the server


def mended_runs(workspace: Workspace) -> Iterator[str]:
    """Set runs that a dead process left at work on the server to Crashed, and forget those that have ended."""
    over = {file: run for file, run in recorded_runs(workspace).items() if run.ended or run.fate() != "alive"}
    if not over:
        return
    import httpx
    import prefect.runtime
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.server import server_url

    if server_url() is None and prefect.runtime.flow_run.id is None:
        return  # nobody to ask: every run has a server, a temporary one if need be, and will
    try:
        with get_client(sync_client=True) as client:
            for file, run in over.items():
                try:
                    known = client.read_flow_run(run.id)
                except ObjectNotFound:
                    known = None
                if known and known.state:
                    at_work = is_at_work(known.state)
                    if at_work and may_still_report(run):
                        continue
                    if at_work or not reported_just_now(run):
                        reason, tasks = crash(client, known, run)
                        if at_work:
                            yield f"run '{known.name}' was {known.state.name} and is now Crashed: {reason}"
                        elif tasks:
                            yield f"run '{known.name}' is {known.state.name}, now with all of its tasks: {reason}"
                if run.night and not run.ended and run.fate() == "dead":
                    note_killed(workspace, run)
                file.unlink(missing_ok=True)
    except httpx.HTTPError as error:
        yield f"runs of dead processes were not looked for: {' '.join(str(error).split()) or type(error).__name__}"


def note_killed(workspace: Workspace, run: Run) -> None:
    """Write down a night that could not do so itself; whoever is told of the next one hears of a recovery."""
    if run.night in {record.run for record in nights(workspace)}:
        return  # it was killed when it had said all but that it has ended
    since = datetime.fromisoformat(run.since)
    reason = f"killed: process {run.pid} on {run.host} ended without a word"
    record_night(workspace, run.night, "killed", since, reason, ended=since)


def is_at_work(state: Any) -> bool:
    """Tell whether a Prefect state claims that a process is at work, or about to be."""
    return state.is_running() or state.is_pending() or state.is_cancelling()


def may_still_report(run: Run) -> bool:
    """Tell whether a run may be alive although it does not hold the workspace: just before or just after it did."""
    fate = run.fate()
    if fate == "elsewhere" and not run.alone:
        return run.ended is None
    if fate == "elsewhere":
        return datetime.now().astimezone() - datetime.fromisoformat(run.ended or run.since) < REPORTING_TIME
    return fate == "alive"


def reported_just_now(run: Run) -> bool:
    """Tell whether what a run said last may still be on its way: its tasks tell of themselves through a queue."""
    ended = datetime.fromisoformat(run.ended) if run.ended else None
    return ended is not None and datetime.now().astimezone() - ended < QUEUE_TIME


def crash(client: "SyncPrefectClient", known: "FlowRun", run: Run) -> tuple[str, int]:
    """Set a flow run and its task runs to Crashed where they are at work; return the reason, and how many tasks."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.states import Crashed

    how = "ended, but could not tell the server" if run.ended else "was killed"
    reason = f"process {run.pid} on {run.host} {how}"
    of_it = FlowRunFilter(id=FlowRunFilterId(any_=[known.id]))
    at_work = [task for task in client.read_task_runs(flow_run_filter=of_it) if task.state and is_at_work(task.state)]
    for task_run in at_work:
        client.set_task_run_state(task_run.id, Crashed(message=reason), force=True)
    if is_at_work(known.state):
        client.set_flow_run_state(known.id, Crashed(message=reason), force=True)
    return reason, len(at_work)
