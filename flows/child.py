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

from tasks.errors import EXIT_INTERRUPTED, Interrupted, NightlyError

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
        self.interruption = ""  # likewise
        self.dvc = ""
        self.line = ""

    def hear(self, line: str) -> None:
        """Remember ``line`` if it may be a reason."""
        if line.startswith("error: "):
            self.own = line.removeprefix("error: ")
        elif line.startswith("interrupted: "):
            self.interruption = line.removeprefix("interrupted: ")
        elif line.startswith("ERROR: "):
            self.dvc = line.removeprefix("ERROR: ")
        elif line:
            self.line = line

    def promise(self, exit_code: int) -> str | None:
        """Return the one line that says how it will go on, None if it won't."""
        # DVC puts an exit code of its own in the stage's place, and has none to tell if a signal ended it as well.
        code_of_stage = f", exited with {EXIT_INTERRUPTED}"
        if exit_code and (self.interruption or exit_code == EXIT_INTERRUPTED or self.dvc.endswith(code_of_stage)):
            why = f" ({self.interruption})" if self.interruption else ""
            return f"will go on from its checkpoint with the next run{why}"
        return None

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

    When the limit passes or this call is interrupted, the command and all its children get SIGINT and, those that
    are still there ``grace_seconds`` later, SIGKILL; the same happens when this very process is killed.

    Args:
        name: what to call it in errors.

    Raises:
        Interrupted: it ended early, by a signal or at the limit, but saved what it had done.
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

        def hear(line: str) -> None:
            kept.write(line + "\n")
            kept.flush()
            emit(line)
            last_words.hear(line)

        expired = False
        try:
            for line in _lines(guard.stdout, deadline):
                if line is None:  # past the deadline: end it, and read its last words
                    expired = True
                    guard.stdin.close()
                else:
                    hear(line)
            guard.wait()
        except BaseException:  # a Ctrl-C, or the run was canceled: nobody else tells how the command ended
            guard.stdin.close()
            for line in _lines(guard.stdout):  # unread, it would block in the middle of its checkpoint
                hear(line or "")
            if promise := last_words.promise(guard.wait()):
                emit(promise)
            raise
    promise = last_words.promise(guard.returncode)
    if expired:
        limit = f"ran past its limit of {limit_seconds / 3600:.3g} hours"
        if promise:
            raise Interrupted(f"{name} {limit}, was stopped and {promise}")
        raise StageFailed(f"{name}: {limit} and was ended")
    if promise:
        raise Interrupted(f"{name} {promise}")
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


def _lines(stream: IO[bytes], deadline: float | None = None) -> Iterator[str | None]:
    """Yield each line of the output, and None once when the deadline passes."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic() if deadline is not None else None
            if left is not None and (left <= 0 or not selector.select(left)):
                deadline = None
                yield None
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
