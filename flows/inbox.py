"""Taking in the inbox, in a process of its own: a decoder that crashes on a hostile file takes no flow with it."""

import sys
from pathlib import Path

from flows import child, stages
from flows.stages import Emit
from flows.workspace import Workspace
from tasks.files import read_json
from tasks.inbox import Intake, is_waiting


def take_in(
    workspace: Workspace, logs: Path, patience_seconds: float, emit: Emit, limit_seconds: float | None = None
) -> Intake:
    """Pack ``data/inbox`` into an archive in ``data/additions`` that DVC tracks; the workspace's lock must be held.

    Archives that are tracked but not there are fetched, those of a killed run are tracked, too.

    Args:
        logs: the run's folder, whose name becomes that of the batch; receives ``inbox.log`` and ``intake.json``.

    Raises:
        NightlyError: it could not be done, or not all of it; the inbox has what was not yet taken in.
    """
    data = workspace.root / "data"
    additions = data / "additions"
    for pointer in _pointers(additions):
        if not (archive := pointer.with_suffix("")).exists():
            stages.fetch(workspace.root, archive)
            emit(f"fetched {archive.name}")
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
        )
        intake = Intake(**read_json(report))
    known = {pointer.stem for pointer in _pointers(additions)}
    for archive in sorted(additions.glob("[!.]*.tar")):
        if archive.name not in known:
            stages.track(workspace.root, archive, patience_seconds, emit)
            if archive.name != intake.archive:
                emit(f"versioned {archive.name}")
    return intake


def _pointers(additions: Path) -> list[Path]:
    """Return the archives' ``.dvc`` files, without those that a kill left empty: DVC could not read them."""
    pointers = sorted(additions.glob("[!.]*.tar.dvc"))
    for pointer in pointers:
        if not pointer.stat().st_size:
            pointer.unlink()
    return [pointer for pointer in pointers if pointer.exists()]
