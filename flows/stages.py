"""The one adapter to DVC. Its command line is its only stable interface, so that is what is used."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from flows import child
from flows.child import StageFailed
from tasks.errors import NightlyError

Emit = Callable[[str], None]
Result = TypeVar("Result")

#: How DVC says that another of its processes works here. It gives up after three seconds; we wait.
BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")
_BETWEEN_TRIES_SECONDS = 2.0

#: The stage after which the images and their classes are known.
DATA_STAGE = "prepare"

#: What DVC says about itself and what is reported otherwise: kept in the log file, not streamed.
_CHATTER = (
    "Running stage '",
    "> ",
    "Generating lock file ",
    "Updating lock file ",
    "To track the changes with git, run:",
    "\tgit add ",
    "To enable auto staging, run:",
    "\tdvc config core.autostage",
    "Use `dvc push` to send your updates to remote storage.",
    "Data and pipelines are up to date.",
    "WARNING: Process '",  # ... had been killed: of a run that was stopped, and DVC has put it right
    "error: ",
    "interrupted: ",
    "ERROR: ",
)


class Outcome(StrEnum):
    """What became of a stage; the values are what people read."""

    ran = "ran"
    unchanged = "nothing it depends on has changed"
    restored = "done before with the same inputs, restored from DVC's run cache"


class DvcBusy(NightlyError):
    """Another DVC command is running in the workspace."""


def stage_names(root: Path) -> list[str]:
    """Return the stages of ``dvc.yaml`` in the order in which they are written there, which must run."""
    names = _dvc(root, "stage", "list", "--name-only", "dvc.yaml").split()
    if not names:
        raise NightlyError(f"{root / 'dvc.yaml'} has no stages")
    return names


def stale_stages(root: Path, names: list[str], patience_seconds: float = 0.0, emit: Emit = print) -> set[str]:
    """Return those of the stages ``names`` whose inputs, command or outputs differ from ``dvc.lock``.

    A stage that only depends on such a one is not among them.
    """
    status = patiently(lambda: _dvc(root, "status", "--json", *names), patience_seconds, emit)
    return set(json.loads(status or "{}")) & set(names)


def reproduce(
    root: Path,
    stage: str,
    *,
    log: Path,
    emit: Emit,
    limit_seconds: float | None = None,
    grace_seconds: float = 20.0,
    patience_seconds: float = 0.0,
    force: bool = False,
) -> Outcome:
    """Bring one stage up to date, assuming that those before it are.

    Args:
        grace_seconds: how long a stage that has to stop may take to save its work.

    Raises:
        Interrupted: the stage stopped early, and goes on from there the next time.
        StageFailed: the stage failed; the message is what it said last.
    """
    command = [*program(), "repro", "--single-item", *(["--force"] if force else []), stage]

    def attempt() -> Outcome:
        outcome = Outcome.ran
        busy = ""

        def listen(line: str) -> None:
            nonlocal outcome, busy
            if line == f"Stage '{stage}' didn't change, skipping":
                outcome = Outcome.unchanged
            elif line.startswith(f"Stage '{stage}' is cached - skipping run"):
                outcome = Outcome.restored
            elif line.startswith("ERROR: ") and any(sign in line for sign in BUSY):
                busy = line.removeprefix("ERROR: ").removeprefix(f"failed to reproduce '{stage}': ")
            elif busy and line.startswith("  (PID "):
                busy += line.removeprefix(" ")
            elif line and not line.startswith(_CHATTER):
                emit(line)

        try:
            child.run(
                command,
                name=stage,
                root=root,
                log=log,
                emit=listen,
                limit_seconds=limit_seconds,
                grace_seconds=grace_seconds,
            )
        except StageFailed:
            if busy:
                raise DvcBusy(busy) from None
            raise
        return outcome

    return patiently(attempt, patience_seconds, emit)


def track(root: Path, path: Path, patience_seconds: float = 0.0, emit: Emit = print) -> None:
    """Put a file or directory under DVC's care: its content in the cache, a ``.dvc`` file beside it for git."""
    # Not --quiet, which leaves out its errors, too. --no-relink: else DVC deletes the file, copies it back from the
    # cache and writes the pointer last, and a kill would lose it.
    patiently(lambda: _dvc(root, "add", "--no-relink", str(path.relative_to(root))), patience_seconds, emit)


def program() -> list[str]:
    """Return how DVC is called."""
    return [sys.executable, "-m", "dvc"]


def patiently(attempt: Callable[[], Result], patience_seconds: float, emit: Emit) -> Result:
    """Return ``attempt()``, trying again for a while as long as another DVC command is in the way."""
    deadline = time.monotonic() + patience_seconds
    told = False
    while True:
        try:
            return attempt()
        except DvcBusy as busy:
            if time.monotonic() >= deadline:
                raise NightlyError(
                    f"another DVC command is at work here and did not end in {patience_seconds:.0f} s: {busy}"
                ) from None
            if not told:
                emit(f"waiting for another DVC command to end ({busy})")
                told = True
            time.sleep(_BETWEEN_TRIES_SECONDS)


def _dvc(root: Path, *arguments: str) -> str:
    """Return the standard output of a short DVC command."""
    done = subprocess.run(
        [*program(), *arguments],
        cwd=root,
        env={**os.environ, "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("ERROR: ")]
    message = " ".join(lines[starts[0] if starts else 0 :]).removeprefix("ERROR: ")
    if any(sign in message for sign in BUSY):
        raise DvcBusy(message)
    if "is not a git repository" in message:
        message += ": run 'git init' there, or work in a clone"
    raise NightlyError(f"dvc {arguments[0]}: {message or f'ended with exit code {done.returncode}'}")
