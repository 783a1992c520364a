"""Which process a run is: noted when it starts, so that the next one can prove that it is dead.

A process number alone proves nothing: after a restart it may be anybody's, in a container even the same one.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from flows.workspace import Workspace
from tasks.files import read_json, write_json

Fate = Literal["alive", "dead", "elsewhere"]


@dataclass(frozen=True)
class Run:
    """Which process a flow run is.

    Attributes:
        id: the flow run's, on the server.
        night: the name of a retraining's folders and page; "" for other flows.
        alone: whether it holds the workspace while it works, so that whoever holds it knows that this run is over.
        mark: tells the process from a later one of the same number, see ``process_mark``.
        host: the machine's name; ``boot`` tells its restarts apart, ``space`` its containers.
        ended: when it ended in order, ISO 8601; None if it never did, or is still at work.
    """

    id: str
    name: str
    pid: int
    mark: str | None
    host: str
    boot: str
    space: str
    since: str
    ended: str | None = None
    night: str = ""
    alone: bool = True

    def fate(self) -> Fate:
        """Tell what has become of the process, as far as that can be known from here."""
        host, boot, space = _here()
        if self.host != host:
            return "elsewhere"
        if self.boot != boot:
            return "dead"
        if self.space != space:
            return "elsewhere"
        return "alive" if self.mark is not None and process_mark(self.pid) == self.mark else "dead"


@contextmanager
def recorded(workspace: Workspace, night: str = "", alone: bool = True) -> Iterator[None]:
    """Note which process the present flow run is, and in the end that it ended in order, however that was.

    Of a run that is killed before, nobody will know that it is dead: this is the first thing that it does.
    """
    import prefect.runtime

    run_id, name, pid = str(prefect.runtime.flow_run.id), prefect.runtime.flow_run.name, os.getpid()
    run = Run(run_id, name or "", pid, process_mark(pid), *_here(), since=now(), night=night, alone=alone)
    file = runs_folder(workspace) / f"{run_id}.json"
    write_json(file, asdict(run))
    try:
        yield
    finally:
        write_json(file, asdict(replace(run, ended=now())))


def recorded_runs(workspace: Workspace) -> dict[Path, Run]:
    """Return what runs noted about themselves."""
    runs = {}
    for file in sorted(runs_folder(workspace).glob("*.json")):
        try:
            runs[file] = Run(**read_json(file))
        except (ValueError, TypeError):  # of another version of this software
            continue
    return runs


def runs_folder(workspace: Workspace) -> Path:
    """Return where runs note which process they are."""
    return workspace.state / "runs"


def process_mark(pid: int) -> str | None:
    """Return what no other process of this number has had since the machine started; None if there is no process."""
    if sys.platform == "linux":
        fields = _stat(pid)
        return fields[19] if fields else None  # its start in clock ticks, which no change of the clock moves
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def started_after(pid: int, moment: float) -> bool:
    """Tell whether a process certainly started after ``moment``, in seconds since 1970, by the present clock."""
    fields = _stat(pid)
    if not fields:
        return False
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + int(fields[19]) / os.sysconf("SC_CLK_TCK") > moment + 60


def now() -> str:
    """Return this moment with its time zone, ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _stat(pid: int) -> list[str]:
    """Return the fields after the command of Linux's ``/proc/<pid>/stat``; none for a process that is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if fields[0] in "ZX" else fields


def _here() -> tuple[str, str, str]:
    """Return the machine's name, and what tells its restarts and its containers apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot = space = ""
    return socket.gethostname(), boot, space
