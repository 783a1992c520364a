"""What DVC and Prefect cost round the work: with nothing to do, for each task, and as a share of a real night.

``.venv/bin/python benchmarks/pipeline.py [--runs 5] [--tiny]``

In a workspace of its own a first night runs on the digits preset (``--tiny``: with a network of one convolution for one
epoch); what is no process of a stage in it is orchestration. Then nothing is new, and DVC and whole nights have nothing
to do, with a Prefect server that is there and with a temporary one. Prefect's cost of a task is the difference between
flows of many empty tasks and of fewer. Medians of ``--runs``, after one that warms up; one JSON object with the goals.
"""

import argparse
import json
import os
import select
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from scratch import SECTIONS, Scratch, Server, family, output

#: So many that their difference stands out of the second that a flow takes anyway.
FEW, MANY = 20, 220
GOALS = {
    "dvc_repro_seconds": 1.5,
    "night_seconds": 20,
    "night_with_temporary_server_seconds": 20,
    "task_milliseconds": 40,
    "tasks_per_run": 20,
    "share_of_a_night": 0.02,
}


def empty_tasks(runs: int) -> dict[str, list[float]]:
    """Time flows of ``FEW`` and ``MANY`` tasks that do nothing, made as those of a night; the server is configured.

    Until the server knows of the end of each: it hears of them by events, and what it writes down later costs, too.
    """
    import flows  # noqa: F401  telemetry off before Prefect is imported

    from prefect import flow, task  # isort: skip
    from prefect.cache_policies import NO_CACHE

    @task(cache_policy=NO_CACHE, persist_result=False)
    def nothing() -> None:
        pass

    @flow(persist_result=False)
    def many(count: int) -> None:
        for number in range(count):
            named = f"stage-{number}"
            nothing.with_options(name=named, task_run_name=named, retries=0)(return_state=True)

    times: dict[str, list[float]] = {str(FEW): [], str(MANY): []}
    for number in range(runs + 1):
        for count, found in times.items():
            began = time.perf_counter()
            run = many(int(count), return_state=True).state_details.flow_run_id
            ended = {
                "flow_runs": {"id": {"any_": [str(run)]}},
                "task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
            }
            url = f"{os.environ['PREFECT_API_URL']}/task_runs/count"
            while httpx.post(url, json=ended, timeout=60).raise_for_status().json() < int(count):
                time.sleep(0.05)
            if number:
                found.append(time.perf_counter() - began)
    return times


@dataclass
class Child:
    """A process below a night: a stage, DVC or another; times in seconds since 1970."""

    kind: str
    name: str
    began: float
    handle: int
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Watch(threading.Thread):
    """Notes when the stages and DVC commands below a process begin and end."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()
        self.children: dict[int, Child] = {}

    def run(self) -> None:
        while True:
            for process in family(self.pid)[1:]:
                self._note(process)
            alive = {child.handle: child for child in self.children.values() if not child.ended}
            for handle in select.select(list(alive), [], [], 0.1)[0]:
                alive[handle].ended = time.time()
                os.close(handle)
            if self.over.is_set() and not alive:
                return

    def _note(self, process: psutil.Process) -> None:
        try:
            words = process.cmdline()
            known = self.children.get(process.pid)
            if known is None:
                known = Child("", "", process.create_time(), os.pidfd_open(process.pid))
                self.children[process.pid] = known
        except (psutil.NoSuchProcess, ProcessLookupError):
            return
        # Anew each time: just forked, a stage still has the command line of its parent, DVC.
        known.name = words[2] if words[1:2] == ["-m"] and len(words) > 2 else ""
        known.kind = "dvc" if known.name == "dvc" else "stage" if known.name.startswith("tasks.") else ""


def real_night(scratch: Scratch, server: Server) -> dict[str, Any]:
    """Run a night in which all is new; return what its seconds went to, and its number of tasks."""
    began = time.time()
    night = scratch.start("nightly", "retrain", log=scratch.folder / "night.log")
    watch = Watch(night.pid)
    watch.start()
    code = night.wait()
    seconds = time.time() - began
    watch.over.set()
    watch.join()
    if code:
        sys.exit(f"error: the night failed: {(scratch.folder / 'night.log').read_text()}")
    stages = [child for child in watch.children.values() if child.kind == "stage"]
    dvc = [child for child in watch.children.values() if child.kind == "dvc"]
    of_dvc = sum(child.seconds for child in dvc)
    below_dvc = sum(child.seconds for child in stages if any(d.began < child.began < d.ended for d in dvc))
    working = sum(child.seconds for child in stages)
    time.sleep(5)  # task runs reach the server by events, some later
    tasks = httpx.post(f"{server.url}/task_runs/count", json={}, timeout=30).raise_for_status().json()
    return {
        "seconds": round(seconds, 1),
        "stage_seconds": {child.name.removeprefix("tasks."): round(child.seconds, 1) for child in stages},
        "dvc_seconds": round(of_dvc - below_dvc, 1),
        "flow_seconds": round(seconds - working - (of_dvc - below_dvc), 1),
        "tasks": tasks,
        "share": round(1 - working / seconds, 4),
    }


def seconds(command: list[str], scratch: Scratch, environment: dict[str, str]) -> float:
    """Return the wall-clock seconds of one run of a command that must succeed."""
    began = time.perf_counter()
    output(command, scratch.root, environment)
    return time.perf_counter() - began


def measure(scratch: Scratch, runs: int) -> dict[str, Any]:
    """Return the JSON object."""
    server = Server(scratch)
    try:
        night = real_night(scratch, server)
        with_server = scratch.environment
        without = {name: value for name, value in with_server.items() if name != "PREFECT_API_URL"}
        without["PREFECT_HOME"] = str(scratch.folder / "prefect-of-its-own")
        commands = {
            "dvc_repro_seconds": (scratch.command("dvc", "repro"), with_server),
            "dvc_version_seconds": (scratch.command("dvc", "--version"), with_server),
            "night_seconds": (scratch.command("nightly", "retrain"), with_server),
            "night_with_temporary_server_seconds": (scratch.command("nightly", "retrain"), without),
            "nightly_help_seconds": (scratch.command("nightly", "--help"), with_server),
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(runs + 1):
            for name, (command, environment) in commands.items():
                took = seconds(command, scratch, environment)
                print(f"{name} {took:.2f}", file=sys.stderr, flush=True)
                if number:
                    times[name].append(took)
        own = [sys.executable, __file__, "--empty-tasks", "--runs", str(runs)]
        empty = json.loads(output(own, scratch.root, with_server).splitlines()[-1])
    finally:
        server.stop()
    few, many = (statistics.median(empty[str(count)]) for count in (FEW, MANY))
    found = {name: round(statistics.median(values), 2) for name, values in times.items()}
    found["task_milliseconds"] = round((many - few) / (MANY - FEW) * 1000, 1)
    found["tasks_per_run"] = night["tasks"]
    found["share_of_a_night"] = night["share"]
    return {
        **{name: {"measured": value, "goal": GOALS.get(name)} for name, value in found.items()},
        "night": night,
        "runs": runs,
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a very small night in place of the digits'")
    parser.add_argument("--empty-tasks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.empty_tasks:
        print(json.dumps(empty_tasks(options.runs)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the server's end
    with tempfile.TemporaryDirectory() as folder:
        sections = SECTIONS if options.tiny else {}
        scratch = Scratch(Path(folder) / "pipeline", tiny=options.tiny, sections=sections)
        print(json.dumps(measure(scratch, options.runs), indent=2))


if __name__ == "__main__":
    main()
