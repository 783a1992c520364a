"""The workspace: where its folders are, and the lock that lets one writer in at a time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.errors import NightlyError
from tasks.files import read_json, write_json


class Busy(NightlyError):
    """Another process is writing in the workspace."""


@dataclass(frozen=True)
class Workspace:
    """The folder with ``dvc.yaml``. What the stages write is named there; these are the flows' ends of it."""

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def presets(self) -> Path:
        return self.root / "presets"

    @property
    def prepared(self) -> Path:
        return self.root / "data" / "prepared"

    @property
    def incoming(self) -> Path:
        return self.root / "data" / "incoming"

    @property
    def predictions(self) -> Path:
        return self.root / "data" / "predictions"

    @property
    def explanations(self) -> Path:
        return self.root / "data" / "explanations"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def exported(self) -> Path:
        return self.models / "exported"

    @property
    def evaluation(self) -> Path:
        return self.models / "evaluation"

    @property
    def registry(self) -> Path:
        return self.models / "registry"

    @property
    def state(self) -> Path:
        """This machine's own: the lock and the logs. Git and DVC ignore it."""
        return self.root / ".nightly"

    def shown(self, path: Path) -> str:
        """Return ``path`` as people read it: relative to the workspace if it lies inside."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def find_workspace(start: Path | None = None) -> Workspace:
    """Return the workspace that ``start`` (the current folder if None) lies in.

    Raises:
        NightlyError: no folder on the way up has a ``dvc.yaml``, or DVC was never set up beside it.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            if not (folder / ".dvc").is_dir():
                raise NightlyError(f"{folder} has a dvc.yaml but no .dvc: run 'git init && dvc init' there")
            return Workspace(folder)
    raise NightlyError(f"{start} is in no workspace: go to the folder that holds dvc.yaml, or below it")


@contextmanager
def locked(workspace: Workspace, command: str) -> Iterator[None]:
    """Hold the workspace for ``command``; the kernel gives it back however this process ends.

    Raises:
        Busy: somebody else holds it; the message says who and since when.
    """
    workspace.state.mkdir(exist_ok=True)
    owner_file = workspace.state / "owner.json"
    lock = FileLock(workspace.state / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Busy(f"the workspace is busy: {_owner(owner_file)}") from None
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        write_json(owner_file, {"command": command, "pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        owner_file.unlink(missing_ok=True)
        lock.release()


def _owner(owner_file: Path) -> str:
    """Say who holds the lock. The file only informs; the lock itself is the kernel's."""
    try:
        owner = read_json(owner_file)
        since = datetime.fromisoformat(owner["since"])
        return f"'{owner['command']}' (process {owner['pid']} on {owner['host']}) since {since:%Y-%m-%d %H:%M:%S}"
    except FileNotFoundError:
        return "another command has just started or is just ending"
