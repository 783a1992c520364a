"""What a check finds, what it looks at, and how it asks other programs: always with a time limit."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flows.workspace import Workspace
from tasks.errors import NightlyError
from tasks.params import Section

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found, in one line, and in another one what to do about it."""

    name: str
    state: State
    text: str
    remedy: str = ""
    fixed: str = ""


@dataclass(frozen=True)
class Case:
    """What the checks look at.

    Attributes:
        settings: the sections of ``params.yaml``; empty if that is not valid.
        dvc: DVC's settings by their dotted names.
    """

    workspace: Workspace
    settings: dict[str, Section] = field(default_factory=dict)
    dvc: dict[str, str] = field(default_factory=dict)
    max_age_hours: float | None = None

    @property
    def root(self) -> Path:
        return self.workspace.root


def ok(text: str) -> Finding:
    return Finding("", "ok", text)


def warn(text: str, remedy: str) -> Finding:
    return Finding("", "warn", text, remedy)


def fail(text: str, remedy: str) -> Finding:
    return Finding("", "fail", text, remedy)


def output(command: list[str], root: Path, limit_seconds: float) -> str:
    """Return the standard output of a command.

    Raises:
        NightlyError: it failed, with the last line that it said, or took too long.
    """
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "NO_COLOR": "1", "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NightlyError(f"no answer within {limit_seconds:.0f} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR: ", "fatal: "))]
        said = (errors or lines or [f"ended with exit code {done.returncode}"])[-1]
        raise NightlyError(re.sub(r"^(?:ERROR|fatal|\S*NightlyError): ", "", said))
    return done.stdout


def dvc(root: Path, *arguments: str, limit_seconds: float = 20.0) -> str:
    """Return what a DVC command prints."""
    return output([sys.executable, "-m", "dvc", *arguments], root, limit_seconds)


def python(root: Path, code: str, limit_seconds: float, *arguments: str) -> str:
    """Run lines of Python in a process of its own, with the installed package and not what lies in ``root``."""
    return output([sys.executable, "-P", "-c", code, *arguments], root, limit_seconds)


def cache_folder(case: Case) -> Path:
    """Return where DVC keeps the content of what it tracks."""
    return case.root / ".dvc" / case.dvc.get("cache.dir", "cache")


def existing(folder: Path) -> Path:
    """Return ``folder``, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
