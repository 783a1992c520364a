"""``nightly doctor``: what would keep the next night from going well, one line each, and what to do about it."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from flows import checks, model_checks, server_checks
from flows.findings import Case, Finding, dvc, fail
from flows.reconcile import reconcile
from flows.workspace import Busy, Workspace, locked
from tasks.errors import NightlyError, describe

if TYPE_CHECKING:
    from rich.console import Console

#: How each state is shown.
_SIGNS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


@dataclass(frozen=True)
class Check:
    """A question and how long its answer may take; ``mend`` is what ``--fix`` does, and returns what that was."""

    look: Callable[[Case], Finding]
    limit_seconds: float = 30.0
    mend: Callable[[Workspace], str] | None = None


def _reconcile(workspace: Workspace) -> str:
    """Do what the next night would do at its start; holding the lock also removes a dead owner's note."""
    try:
        with locked(workspace, "nightly doctor --fix"):
            return "; ".join(reconcile(workspace, lambda line: None)) or "took the lock over"
    except Busy as busy:
        raise NightlyError(f"not while {busy}") from None


CHECKS = {
    "software": Check(checks.software),
    "telemetry": Check(checks.telemetry),
    "parameters": Check(checks.parameters),
    "notifications": Check(checks.notifications),
    "git": Check(checks.git),
    "dvc": Check(checks.dvc_works, mend=_reconcile),
    "lock": Check(checks.lock, mend=_reconcile),
    "leftovers": Check(checks.left_behind, mend=_reconcile),
    "server": Check(server_checks.server),
    "runs": Check(server_checks.zombies, mend=_reconcile),
    "slots": Check(server_checks.slots, mend=lambda _: server_checks.free_slots()),
    "schedule": Check(server_checks.schedule, mend=lambda _: server_checks.resume_schedule()),
    "disk": Check(checks.disk),
    "gpu": Check(checks.gpu, limit_seconds=75),
    "champion": Check(model_checks.champion, limit_seconds=75),
    "registry": Check(model_checks.restorable, limit_seconds=60),
    "remote": Check(model_checks.remote),
    "last success": Check(checks.success),
}


def examine(workspace: Workspace, *, fix: bool = False, max_age_hours: float | None = None) -> list[Finding]:
    """Look at everything that a night needs.

    Args:
        fix: do what is safe: what killed runs left, a schedule that was stopped, slots that nobody occupies.
        max_age_hours: a night must have ended well within so many hours.
    """
    case = _case(workspace, max_age_hours)
    findings = _answers(case, CHECKS)
    wrong = {name: CHECKS[name] for name, found in findings.items() if found.state != "ok" and CHECKS[name].mend}
    if fix and wrong:
        done = {name: _mended(workspace, check) for name, check in wrong.items()}
        again = _answers(_case(workspace, max_age_hours), wrong)
        findings |= {name: replace(again[name], fixed=done[name]) for name in wrong}
    return list(findings.values())


def exit_code(findings: list[Finding]) -> int:
    """Return 1 if anything failed, else 0."""
    return int(any(finding.state == "fail" for finding in findings))


def show(findings: list[Finding], console: "Console") -> None:
    """Print a line for each finding, and one more for what to do about it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        sign, style = _SIGNS[finding.state]
        text = Text(finding.text)
        if finding.fixed:
            text.append(f"\nfixed: {finding.fixed}", style="green")
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="cyan")
        table.add_row(Text(sign, style=style), finding.name, text)
    console.print(table)


def as_json(findings: list[Finding]) -> str:
    """Return the findings as a JSON list."""
    return json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False)


def hours(age: str) -> float:
    """Return an age such as ``36h``, ``90m`` or ``2d`` in hours.

    Raises:
        NightlyError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd]?)", age.strip())
    if match is None:
        raise NightlyError(
            f"--max-age must be a number of hours such as 36h, or of m(inutes) or d(ays), but is '{age}'"
        )
    return float(match[1]) * {"m": 1 / 60, "h": 1, "": 1, "d": 24}[match[2]]


def _case(workspace: Workspace, max_age_hours: float | None) -> Case:
    """Read the settings that several checks need; that they cannot be read is the finding of one of them.

    Prefect is imported on the way, before several threads want it.
    """
    from flows.settings import read_settings

    settings, of_dvc = {}, ""
    with contextlib.suppress(NightlyError):
        settings = read_settings(workspace.params)
    with contextlib.suppress(NightlyError):
        of_dvc = dvc(workspace.root, "config", "--list")
    pairs = (line.partition("=") for line in of_dvc.splitlines())
    return Case(workspace, settings, {key.strip(): value.strip() for key, _, value in pairs}, max_age_hours)


def _answers(case: Case, asked: dict[str, Check]) -> dict[str, Finding]:
    """Ask all at once; one that takes too long or breaks is a finding, too, and keeps no other from answering."""
    answers: dict[str, Finding] = {}

    def ask(name: str, look: Callable[[Case], Finding]) -> None:
        try:
            found = look(case)
        except (NightlyError, OSError) as error:
            found = fail(describe(error), "mend what it names")
        except Exception as error:
            found = fail(f"the check broke: {describe(error)}", "report it")
        answers[name] = replace(found, name=name)

    began = time.monotonic()
    # Daemons: one that hangs does not keep the command from ending.
    threads = {
        name: threading.Thread(target=copy_context().run, args=(ask, name, check.look), daemon=True)
        for name, check in asked.items()
    }
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, asked[name].limit_seconds - (time.monotonic() - began)))
    return {
        name: answers.get(name) or replace(fail(f"no answer within {check.limit_seconds:g} s", "try again"), name=name)
        for name, check in asked.items()
    }


def _mended(workspace: Workspace, check: Check) -> str:
    assert check.mend
    try:
        return check.mend(workspace)
    except (NightlyError, OSError) as error:
        return f"nothing: {describe(error)}"
