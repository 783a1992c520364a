"""Supervised children: streamed line by line, limited in time, and never alive without their flow."""

import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tasks.errors import NightlyError

GUARD = Path(__file__).with_name("guard.py")

#: Terminal sequences (colors, cursor moves); a log wants none.
_TERMINAL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_NEWLINE = re.compile(rb"\r\n|\n|\r")


class StageFailed(NightlyError):
    """A child ended badly; the text is its own last word on why."""


class LastWords:
    """What a child said last about why it ends."""

    def __init__(self) -> None:
        self.own = ""  # of a stage, see tasks.errors.run_main
        self.dvc = ""
        self.line = ""

    def hear(self, line: str) -> None:
        """Remember ``line`` if it may be a reason."""
        if line.startswith("error: "):
            self.own = line.removeprefix("error: ")
        elif line.startswith("ERROR: "):
            self.dvc = line.removeprefix("ERROR: ")
        elif line:
            self.line = line

    def explain(self, exit_code: int) -> str:
        """Return the best reason there is, in one line."""
        if self.own:
            return self.own
        what = self.dvc or f"ended with exit code {exit_code}"
        return f"{what}; its last line was: {self.line}" if self.line else what


def run(
    command: list[str],
    *,
    name: str,
    root: Path,
    log: Path,
    emit: Callable[[str], None],
    limit_seconds: float | None = None,
    grace_seconds: float = 20.0,
) -> None:
    """Run ``command`` in ``root`` and hand each line of its output to ``emit`` and to the file ``log``.

    When the limit passes or this call is interrupted, the command and all its children get SIGTERM and,
    ``grace_seconds`` later, SIGKILL; the same happens when this very process is killed.

    Args:
        name: what to call it in errors.

    Raises:
        StageFailed: it exited with another code than 0, or ran past the limit.
    """
    deadline = time.monotonic() + limit_seconds if limit_seconds else None
    log.parent.mkdir(parents=True, exist_ok=True)
    last_words = LastWords()
    with (
        log.open("a", encoding="utf-8") as kept,
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(grace_seconds), *command],
            cwd=root,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for this process, which then ends the child in order.
            start_new_session=True,
        ) as guard,
    ):
        assert guard.stdin
        assert guard.stdout
        expired = False
        try:
            for line in _lines(guard, deadline):
                if line is None:  # past the deadline: end it, and read its last words
                    expired = True
                    guard.stdin.close()
                    continue
                kept.write(line + "\n")
                kept.flush()
                emit(line)
                last_words.hear(line)
        finally:
            guard.stdin.close()
            guard.wait()
    if expired:
        raise StageFailed(f"{name}: ran past its limit of {limit_seconds / 3600:.3g} hours and was ended")
    if guard.returncode != 0:
        shown = log.relative_to(root) if log.is_relative_to(root) else log
        raise StageFailed(f"{name}: {last_words.explain(guard.returncode)} (log: {shown})")


def _environment() -> dict[str, str]:
    """Return this environment with this Python's programs first and plain, unbuffered output."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
        environment.pop(name, None)
    programs = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([programs, environment.get("PATH", os.defpath)])
    return environment


def _lines(guard: "subprocess.Popen[bytes]", deadline: float | None) -> Iterator[str | None]:
    """Yield each line of the output, and None once when the deadline passes."""
    assert guard.stdout
    stream: IO[bytes] = guard.stdout
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if deadline is not None and time.monotonic() >= deadline:
                deadline = None
                yield None
            left = deadline - time.monotonic() if deadline is not None else 1.0
            if not selector.select(max(0.0, min(left, 1.0))):
                # A process that fled from the group may hold the pipe open for ever.
                if guard.poll() is not None:
                    break
                continue
            chunk = os.read(stream.fileno(), 65536)
            if not chunk:
                break
            *complete, pending = _NEWLINE.split(pending + chunk)
            yield from map(_clean, complete)
    if pending:
        yield _clean(pending)


def _clean(line: bytes) -> str:
    return _TERMINAL.sub("", line.decode("utf-8", errors="replace")).rstrip()
