"""Removing old models' local copies, where DVC provably has others."""

import math
import shutil
from pathlib import Path

from flows import storage
from flows.stages import Emit
from flows.workspace import Workspace
from tasks import promote, registry
from tasks.errors import NightlyError, describe
from tasks.files import partial_path, tidy_up


def prune(
    workspace: Workspace,
    keep: int | None,
    *,
    log: Path,
    emit: Emit,
    limit_seconds: float | None = None,
    patience_seconds: float = 0.0,
) -> list[str]:
    """Remove all registered models' directories but the ``keep`` newest; return the removed models' ids.

    The champion stays, as does the model that a rollback returns to, and whatever neither DVC's cache nor its remote
    holds. What keeps this from being done is no error: it is done by another call.
    """
    removed: list[str] = []
    if keep is None:
        return removed
    try:
        old = [path for path in _beyond(workspace, keep) if path.with_name(f"{path.name}.dvc").is_file()]
        if not old:
            return removed
        copies = storage.copies(
            workspace.root, old, log=log, emit=emit, limit_seconds=limit_seconds, patience_seconds=patience_seconds
        )
        for path, copy in copies.items():
            if copy.expendable:
                _remove(path)
                removed.append(path.name)
            else:
                why = "neither DVC's cache nor its remote holds it" if copy.unchanged else "it was changed by hand"
                emit(f"{path.name} is not pruned: {why}")
    except (NightlyError, OSError) as reason:
        emit(f"pruning is postponed: {describe(reason)}")
    return removed


def _beyond(workspace: Workspace, keep: int) -> list[Path]:
    """Return the directories that may go, oldest first; a model is as old as its last time of going into service."""
    models = workspace.models
    for path in workspace.registry.glob("*.dvc"):
        tidy_up(path.with_suffix(""))  # what a killed call left
    last_service = {entry.id: number for number, entry in enumerate(promote.history(models)) if entry.action != "hold"}
    local = [path for path in workspace.registry.glob("[!.]*") if path.is_dir()]
    # One without a line in the ledger was registered by a run that was killed, and goes into service next.
    local.sort(key=lambda path: (last_service.get(path.name, math.inf), path.name))
    in_use = {registry.champion_id(models), _before_champion(models)}
    return [path for path in local[:-keep] if path.name not in in_use]


def _before_champion(models: Path) -> str | None:
    try:
        return promote.rollback_target(models)
    except NightlyError:  # there is none
        return None


def _remove(path: Path) -> None:
    """Remove a directory: whole at once, as far as anybody can see."""
    partial = partial_path(path)
    path.rename(partial)
    shutil.rmtree(partial)
