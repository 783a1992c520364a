"""A Prefect server that is away for three scheduled nights, two nights at once, and a night that is canceled.

``.venv/bin/python benchmarks/outage.py [--folder DIR]``

In a workspace of its own with the digits, whose training is a stand-in that can be made long, ``nightly serve`` runs a
night every minute. The server is killed for three of them and comes back: of the runs that were missed, one does the
work. Then two retrainings start at the same moment, and a run of the schedule's is canceled in mid-training.
Prints one JSON object; exits with 1 if anything was not as it must be. Takes about seven minutes.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from night_kill import Inbox, ask
from scratch import Scratch, Server, family

MISSED, GRACE_SECONDS = 3, 20


def wait(condition: Callable[[], Any], limit_seconds: float, what: str) -> Any:
    """Return what ``condition`` gives as soon as that is something."""
    deadline = time.monotonic() + limit_seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            sys.exit(f"error: waited {limit_seconds} s in vain for {what}")
        time.sleep(0.2)
    return found


class Trial:
    """The workspace, its server and its ``nightly serve``."""

    def __init__(self, folder: Path) -> None:
        self.scratch = Scratch(folder, environment={"OMP_NUM_THREADS": "1"}, stand_ins=True)
        self.scratch.edit("retrain", stop_grace_seconds=GRACE_SECONDS, class_recall_tolerance=1.0)
        self.scratch.edit("serve", cron="* * * * *", timezone="UTC")
        self.scratch.commit("a night every minute")
        self.scratch.git("push", "--quiet")
        self.inbox = Inbox(self.scratch, np.random.default_rng(0))
        self.server = Server(self.scratch)
        self.serving = self.scratch.start("nightly", "serve", log=folder / "serve.log")

    def runs(self, since: datetime, until: datetime) -> list[dict[str, Any]]:
        """Return the schedule's runs that were due in this time, in their order."""
        span = {"after_": since.isoformat(), "before_": until.isoformat()}
        wanted = {"flow_runs": {"expected_start_time": span}, "sort": "EXPECTED_START_TIME_ASC"}
        return ask(self.server.url, "POST", "/flow_runs/filter", wanted)

    def stages(self) -> list[psutil.Process]:
        """Return the processes of stages that ``nightly serve`` or its runs started."""
        found = []
        for process in family(self.serving.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(word.startswith("tasks.") for word in process.cmdline()):
                    found.append(process)
        return found

    def is_quiet(self) -> bool:
        """Whether a model is in service and nobody at work."""
        owner = self.scratch.root / ".nightly" / "owner.json"
        return not owner.exists() and (self.scratch.root / "models" / "champion.json").exists()


def outage(trial: Trial) -> dict[str, Any]:
    """Take the server away for ``MISSED`` nights, with new images waiting; say what became of each of those."""
    wait(trial.is_quiet, 180, "the first night's end")
    trial.inbox.drop(20)
    trial.server.kill()
    gone = datetime.now(UTC)
    back = (gone + timedelta(minutes=MISSED)).replace(second=20, microsecond=0)
    back += timedelta(minutes=1) if back < gone + timedelta(minutes=MISSED) else timedelta()
    time.sleep((back - datetime.now(UTC)).total_seconds())
    trial.server.start()
    answers = datetime.now(UTC)
    final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}

    def ended() -> list[dict[str, Any]]:
        runs = trial.runs(gone, answers)
        return runs if runs and all(run["state"]["type"] in final for run in runs) else []

    runs = wait(ended, 240, "the end of the runs that were missed")
    states = [f"{run['state']['name']}: {run['state']['message'] or 'promoted or held'}" for run in runs]
    return {
        "away_seconds": round((answers - gone).total_seconds()),
        "due": len(runs),
        "worked": sum(run["state"]["name"] != "Skipped" for run in runs),
        "states": states,
        "serve_survived": trial.serving.poll() is None,
        "images": trial.inbox.account(),
    }


def two_at_once(trial: Trial) -> dict[str, Any]:
    """Start two retrainings at the same moment, between two of the schedule's."""
    wait(lambda: trial.is_quiet() and 10 < datetime.now().second < 25, 180, "a quiet moment")
    trial.inbox.drop(5)
    logs = [trial.scratch.folder / f"{name}.log" for name in ("one", "other")]
    started = [trial.scratch.start("nightly", "retrain", log=log) for log in logs]
    codes = [process.wait() for process in started]
    said = [line for log in logs for line in log.read_text().splitlines() if line.startswith("skipped: ")]
    return {"exit_codes": sorted(codes), "said": said}


def cancel(trial: Trial) -> dict[str, Any]:
    """Cancel a run in the middle of its training, as a click in the UI does."""
    wait(lambda: trial.is_quiet() and 10 < datetime.now().second < 25, 180, "a quiet moment")
    trial.inbox.drop(5)
    trial.scratch.edit("train", learning_rate=0.0021)

    def training() -> dict[str, Any] | None:
        at_work = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
        runs = ask(trial.server.url, "POST", "/flow_runs/filter", at_work)
        return runs[0] if runs and trial.stages() else None

    run = wait(training, 120, "a stage at work")
    left = trial.stages()
    began = time.monotonic()
    state = {"type": "CANCELLING", "name": "Cancelling"}
    ask(trial.server.url, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state})
    psutil.wait_procs(left, timeout=60)
    seconds = time.monotonic() - began
    name = wait(
        lambda: (
            (now := ask(trial.server.url, "GET", f"/flow_runs/{run['id']}")["state"])["type"] == "CANCELLED"
            and now["name"]
        ),
        60,
        "the state Cancelled",
    )
    return {
        "state": name,
        "processes": len(left),
        "gone_after_seconds": round(seconds, 1),
        "grace_seconds": GRACE_SECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for the workspace, which is kept; a temporary one otherwise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        trial = Trial(options.folder or Path(temporary) / "outage")
        try:
            found = {"outage": outage(trial), "two_at_once": two_at_once(trial), "cancel": cancel(trial)}
        finally:
            trial.serving.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                trial.serving.wait(60)
            trial.server.stop()
    images = found["outage"]["images"]
    problems = [
        what
        for what, wrong in {
            "not one of the missed nights worked, but more or none": found["outage"]["worked"] != 1,
            "nightly serve ended": not found["outage"]["serve_survived"],
            "images were lost, taken twice or left": images["lost"] or images["twice"] or images["waiting"],
            "of two retrainings not just one was skipped": found["two_at_once"]["exit_codes"] != [0, 75],
            "a canceled stage outlived its grace": found["cancel"]["gone_after_seconds"] > GRACE_SECONDS,
        }.items()
        if wrong
    ]
    print(json.dumps({**found, "problems": problems}, indent=2, ensure_ascii=False))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
