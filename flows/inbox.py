"""Taking in the inbox, in a process of its own: a decoder that crashes on a hostile file takes no flow with it."""

import sys
from pathlib import Path

from flows import child, stages, storage
from flows.stages import Emit
from flows.workspace import Workspace
from tasks.files import read_json
from tasks.inbox import Intake, is_waiting


def is_due(workspace: Workspace) -> bool:
    """Tell in milliseconds whether ``take_in`` would find anything: images, or archives that lack a half."""
    archives, pointers = _archives(workspace), _pointers(workspace)
    return archives != pointers or is_waiting(workspace.root / "data" / "inbox", _additions(workspace))


def take_in(
    workspace: Workspace,
    logs: Path,
    patience_seconds: float,
    emit: Emit,
    limit_seconds: float | None = None,
    grace_seconds: float = 20.0,
) -> Intake:
    """Pack ``data/inbox`` into an archive in ``data/additions`` that DVC tracks; the workspace's lock must be held.

    Archives that are tracked but not there are fetched, those of a killed run are tracked, too.

    Args:
        logs: the run's folder, whose name becomes that of the batch; receives ``inbox.log`` and ``intake.json``.

    Raises:
        NightlyError: it could not be done, or not all of it; the inbox has what was not yet taken in.
    """
    data, additions = workspace.root / "data", _additions(workspace)
    for name in sorted(_pointers(workspace) - _archives(workspace)):
        storage.fetch(
            workspace.root,
            additions / name,
            log=logs / "inbox.log",
            emit=emit,
            limit_seconds=limit_seconds,
            patience_seconds=patience_seconds,
        )
        emit(f"fetched {name}")
    intake = Intake()
    if is_waiting(data / "inbox", additions):
        report = logs / "intake.json"
        folders = {name: data / name for name in ("inbox", "additions", "quarantine")}
        paths = folders | {"prepared": workspace.prepared, "models": workspace.models, "report": report}
        child.run(
            [
                *(sys.executable, "-m", "tasks.inbox", "--batch", logs.name, "--params", str(workspace.params)),
                *(word for name, path in paths.items() for word in (f"--{name}", workspace.shown(path))),
            ],
            name="inbox",
            root=workspace.root,
            log=logs / "inbox.log",
            emit=emit,
            limit_seconds=limit_seconds,
            grace_seconds=grace_seconds,
        )
        intake = Intake(**read_json(report))
    for name in sorted(_archives(workspace) - _pointers(workspace)):
        stages.track(workspace.root, additions / name, patience_seconds, emit)
        if name != intake.archive:
            emit(f"versioned {name}")
    return intake


def _additions(workspace: Workspace) -> Path:
    return workspace.root / "data" / "additions"


def _archives(workspace: Workspace) -> set[str]:
    return {path.name for path in _additions(workspace).glob("[!.]*.tar")}


def _pointers(workspace: Workspace) -> set[str]:
    """Return the names of the archives that DVC knows, whether they are here or not."""
    return {path.stem for path in _additions(workspace).glob("[!.]*.tar.dvc")}
