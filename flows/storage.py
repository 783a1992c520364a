"""DVC's storage: sending what is new to the remote, and asking what cache and remote really hold."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flows import child, stages
from flows.child import StageFailed
from flows.stages import DvcBusy, Emit

_NO_REMOTE = "no remote specified"
#: DVC's exit code is 0 all the same.
_LOST = "WARNING: Some of the cache files do not exist neither locally nor on remote"


class NoRemote(StageFailed):
    """No remote storage is configured, or none is the default."""


@dataclass(frozen=True)
class Copies:
    """What there is of a tracked directory besides the one in the workspace.

    Attributes:
        unchanged: the one in the workspace is what its ``.dvc`` file says.
        in_cache: all of its files are in DVC's cache.
        in_remote: all of them are in the remote storage, which was asked and can be reached.
    """

    unchanged: bool
    in_cache: bool
    in_remote: bool

    @property
    def expendable(self) -> bool:
        """Whether DVC can bring the directory back, just as it is."""
        return self.unchanged and (self.in_cache or self.in_remote)


def push(
    root: Path, *, log: Path, emit: Emit, limit_seconds: float | None = None, patience_seconds: float = 0.0
) -> list[str]:
    """Send all that ``dvc.lock`` and the ``.dvc`` files name to the remote; return what is wrong all the same.

    Raises:
        NoRemote: there is none.
        StageFailed: not all of it arrived. What did is not sent again.
    """
    lines = _run(root, "push", log=log, emit=emit, limit_seconds=limit_seconds, patience_seconds=patience_seconds)
    lost = any(line.startswith(_LOST) for line in lines)
    shown = log.relative_to(root) if log.is_relative_to(root) else log
    return [f"some of the data is neither in DVC's cache nor in the remote (log: {shown})"] if lost else []


def fetch(
    root: Path,
    path: Path,
    *,
    log: Path,
    emit: Emit,
    limit_seconds: float | None = None,
    patience_seconds: float = 0.0,
) -> None:
    """Bring a tracked file or directory back from DVC's cache or its remote storage.

    Raises:
        StageFailed: it is in neither, or the remote can't be reached.
    """
    pointer = f"{path.relative_to(root)}.dvc"
    limits = {"limit_seconds": limit_seconds, "patience_seconds": patience_seconds}
    try:
        _run(root, "pull", pointer, log=log, emit=emit, **limits)  # not --quiet, which leaves out the errors, too
    except StageFailed as failure:
        raise StageFailed(
            f"{path.relative_to(root)} is neither in DVC's cache nor in a remote that answers ({failure}): bring it "
            f"back, or remove {pointer} if it may be forgotten"
        ) from None


def copies(
    root: Path,
    paths: Iterable[Path],
    *,
    log: Path,
    emit: Emit,
    limit_seconds: float | None = None,
    patience_seconds: float = 0.0,
) -> dict[Path, Copies]:
    """Return what DVC's cache and remote hold of tracked directories, file by file.

    ``dvc status --cloud`` would not do: it takes a directory's listing in the remote for all of its files.
    """
    names = {path: f"{path.relative_to(root)}" for path in paths}
    asked = ("data", "status", "--json", "--granular", "--not-in-remote", *names.values())
    lines = _run(root, *asked, log=log, emit=emit, limit_seconds=limit_seconds, patience_seconds=patience_seconds)
    status = json.loads(next(line for line in lines if line.startswith("{")))
    changed = [path for kind in status.get("uncommitted", {}).values() for path in _paths(kind)]

    def concerns(listed: Iterable[str], name: str) -> bool:
        return any(path.rstrip("/") == name or path.startswith(f"{name}/") for path in listed)

    return {
        path: Copies(
            unchanged=not concerns(changed, name),
            in_cache=not concerns(status.get("not_in_cache", []), name),
            in_remote=not concerns(status.get("not_in_remote", []), name),
        )
        for path, name in names.items()
    }


def _paths(changes: list[str | dict[str, str]]) -> list[str]:
    """Return the paths of one kind of change; a renamed file has two."""
    return [path for change in changes for path in (change.values() if isinstance(change, dict) else [change])]


def _run(
    root: Path, *arguments: str, log: Path, emit: Emit, limit_seconds: float | None, patience_seconds: float
) -> list[str]:
    """Return the lines of a DVC command that may take long or hang, and that must not outlive its flow."""
    name = f"dvc {arguments[0]}"

    def attempt() -> list[str]:
        lines: list[str] = []
        command = [*stages.program(), *arguments]
        try:
            child.run(command, name=name, root=root, log=log, emit=lines.append, limit_seconds=limit_seconds)
        except StageFailed as failure:
            errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
            if any(_NO_REMOTE in line for line in errors):
                raise NoRemote(f"{name}: {_NO_REMOTE}") from None
            if busy := [line for line in errors if any(sign in line for sign in stages.BUSY)]:
                raise DvcBusy(busy[0]) from None
            raise StageFailed(f"{name}: {errors[-1]}" if errors else str(failure)) from None
        return lines

    return stages.patiently(attempt, patience_seconds, emit)
