"""Predictions killed with SIGKILL at random moments and gone on with, against one that nobody disturbed.

``.venv/bin/python benchmarks/predict_kill.py [--kills 20] [--files 600] [--model BUNDLE]``

A folder of random JPEGs of 32 px and some bad files is classified by ``python -m tasks.predict``, as flows start it.
Every second kill comes at a moment spread evenly over the time of an undisturbed run. Most of so short a run is
Python's start, so the others come in turn while it plans, classifies and finishes. After each kill the same command
is run again, until a run is faster than its killer, or was killed six times and is left alone; its result must have
each file once, be the same bytes, and leave nothing else behind.

Prints one JSON object; exits with 1 if a result was not so.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
from natsort import natsorted

from tasks.store import PARTS, PLAN

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["planning", "classifying", "finishing"]
#: When a result in the making is killed, one time after the other.
AIMS = ["planning", "anywhere", "classifying", "anywhere", "finishing", "anywhere"]


def make_files(folder: Path, count: int) -> list[str]:
    """Write JPEGs and, one in ten, something else; return the names in natural order."""
    noise, names = np.random.default_rng(0), []
    folder.mkdir()
    for number in range(count):
        data = cv2.imencode(".jpg", noise.integers(0, 256, (32, 32, 3), np.uint8))[1].tobytes()
        if number % 10 == 9:
            data = [b"", b"no image", data[: len(data) // 2]][number // 10 % 3]
        names.append(f"{number}.jpg")
        (folder / names[-1]).write_bytes(data)
    return natsorted(names)


@dataclass
class Trial:
    """One way to run the command.

    Attributes:
        names: of all files in natural order.
        scratch: what the command takes for the system's temporary directory.
    """

    folder: Path
    names: list[str]
    model: Path
    shard_files: int
    params: Path
    scratch: Path
    problems: list[str] = field(default_factory=list)
    lost: int = 0
    twice: int = 0

    def start(self, out: Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tasks.predict", self.folder, "--out", out, "--model", self.model]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.scratch)}
        return subprocess.Popen(
            [*map(str, command), "--params", str(self.params)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def whole(self, out: Path) -> dict[str, float]:
        """Run undisturbed; return the seconds at which each stage began and the last one ended."""
        began, marks = time.perf_counter(), {"anywhere": 0.0}
        child = self.start(out)
        while child.poll() is None:
            for name in STAGES:
                if name not in marks and reached(out, name, self.shards):
                    marks[name] = time.perf_counter() - began
            time.sleep(0.001)
        self.succeeded(child)
        return marks | {"end": time.perf_counter() - began}

    @property
    def shards(self) -> int:
        return math.ceil(len(self.names) / self.shard_files)

    def succeeded(self, child: "subprocess.Popen[str]") -> None:
        said = child.communicate()[0]
        if child.returncode:
            sys.exit(f"error: the command failed by itself: {said}")

    def check(self, out: Path, reference: Path) -> None:
        """Compare a complete result with the undisturbed one."""
        found = Counter(pq.read_table(out / PARTS, columns=["path"])["path"].to_pylist())
        self.lost += len(set(self.names) - found.keys())
        self.twice += sum(count - 1 for count in found.values()) + len(found.keys() - set(self.names))
        ours, theirs = contents(out), contents(reference)
        differing = [name for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)]
        self.problems += [f"{out.parent.name}: {name} differs" for name in differing]
        strangers = {path.name for path in out.parent.iterdir()} - {out.name}
        strangers |= {path.name for path in out.rglob(".*")} | {path.name for path in self.scratch.iterdir()}
        self.problems += [f"{out.parent.name}: {name} is left over" for name in sorted(strangers)]


def aside(out: Path) -> Path:
    """Return where a result stands before it is complete."""
    return out.with_name(f".{out.name}.unfinished")


def contents(out: Path) -> dict[str, bytes]:
    """Return a result's files, without the summary, which tells of times, and the plan's, too."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "summary.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def parts_in(out: Path) -> int:
    return len(list((aside(out) / PARTS).glob("part-*")))


def reached(out: Path, name: str, shards: int) -> bool:
    """Tell by its files whether a run is at a stage or beyond."""
    unfinished = aside(out)
    if name == "planning":
        return unfinished.with_name(f"{unfinished.name}.lock").exists()
    return (unfinished / PLAN).exists() and (name == "classifying" or parts_in(out) == shards)


def stage(out: Path, shards: int, began_ns: int, parts_before: int, said: str) -> str:
    """Return what a killed run was at, going by what it left and said."""
    summary = out / "summary.json"
    if summary.exists() and summary.stat().st_mtime_ns > began_ns:
        return "after"
    if not reached(out, "planning", shards) or (parts_before and "going on" not in said):
        return "starting"
    if not reached(out, "classifying", shards):
        return "planning"
    return "finishing" if parts_in(out) == shards else f"shard {parts_in(out) + 1}"


def kill_and_go_on(trial: Trial, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run, kill and go on until enough were killed; return what was seen."""
    moments = random.Random(seed)
    reference = work / "whole" / "out"
    trial.whole(work / "warm-up" / "out")
    marks = trial.whole(reference)
    trial.check(reference, work / "warm-up" / "out")
    ends = dict(zip(STAGES, [*(marks[name] for name in STAGES[1:]), marks["end"]], strict=True))
    hits: list[dict[str, Any]] = []
    started = completed = 0

    def wait(child: "subprocess.Popen[str]", out: Path, aim: str) -> None:
        """Wait for a moment to kill, or until it is too late."""
        if aim == "anywhere":
            earliest, delay = 0.0, moments.uniform(0, marks["end"])
        else:
            # All parts of a run that goes on may be there as soon as it has read its plan.
            earliest, delay = min(marks[aim], marks["classifying"]), moments.uniform(0, ends[aim] - marks[aim])
        began = time.perf_counter()
        while child.poll() is None and (
            time.perf_counter() - began < earliest or (aim != "anywhere" and not reached(out, aim, trial.shards))
        ):
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(delay)

    while len(hits) < kills:
        out = work / f"cut-{completed}" / "out"
        for aim in [*AIMS[: kills - len(hits)], None]:
            parts_before, began_ns = parts_in(out), time.time_ns()
            child, started = trial.start(out), started + 1
            if aim:
                wait(child, out, aim)
            if aim is None or child.poll() is not None:
                trial.succeeded(child)
                break
            child.send_signal(signal.SIGKILL)
            said = child.communicate()[0]
            if child.returncode != -signal.SIGKILL:
                sys.exit(f"error: the command failed by itself: {said}")
            hits.append(stage(out, trial.shards, began_ns, parts_before, said))
        trial.check(out, reference)
        completed += 1
    return {
        "files": len(trial.names),
        "shards": trial.shards,
        "unbroken": {name: round(seconds, 2) for name, seconds in marks.items()},
        "kills": len(hits),
        "stages": dict(Counter(re.sub(r"\d+", "n", hit) for hit in hits).most_common()),
        "hits": hits,
        "runs": started,
        "results": completed,
        "rows_lost": trial.lost,
        "rows_twice": trial.twice,
        "identical": not any(problem.endswith("differs") for problem in trial.problems),
        "problems": trial.problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--files", type=int, default=600)
    parser.add_argument("--shard-files", type=int, default=20)
    parser.add_argument("--model", type=Path, help="an exported bundle; a small one is made by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model = options.model
        if model is None:
            from predict_folder import make_bundle

            images = np.random.default_rng(1).integers(0, 256, (200, 32, 32, 3), np.uint8)
            with contextlib.redirect_stdout(sys.stderr):
                model = make_bundle(work / "model", images, 32, 0, "resnet20").path
        params = work / "params.yaml"
        params.write_text(json.dumps({"predict": {"shard_files": options.shard_files, "formats": ["csv", "jsonl"]}}))
        names = make_files(work / "folder", options.files)
        (work / "scratch").mkdir()
        trial = Trial(work / "folder", names, model.absolute(), options.shard_files, params, work / "scratch")
        found = kill_and_go_on(trial, work, options.kills, options.seed)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    sys.exit(bool(found["problems"] or found["rows_lost"] or found["rows_twice"]))


if __name__ == "__main__":
    main()
