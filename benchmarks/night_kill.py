"""Nights killed with SIGKILL at random moments: the stage, the flow, the Prefect server; the next night finishes alone.

``.venv/bin/python benchmarks/night_kill.py [--kills 10] [--seed S] [--database URL] [--real]``

In a workspace of its own with the digits, where a softmax regression stands in for the stages that need a
deep-learning library (``--real``: where the real ones train a very small network), each round drops new images into
the inbox, starts a night, and kills at a random moment of it. Nights are started by ``nightly retrain`` and, every
second one, by a ``nightly serve`` that runs all the time. What was killed is started again: the server some seconds
later, the night at once. Meanwhile another process reads the champion every 50 ms.

Prints one JSON object; exits with 1 if anything was not as it must be. Takes about a minute a kill.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from scratch import PERSON, Scratch, Server, family, output

TARGETS = ("stage", "flow", "server")
READ_SECONDS = 0.05
#: Reads between two that compute with the model.
DEEP_EVERY = 200
NIGHT_LIMIT_SECONDS = 900
#: Stages of a night with new images, the taking in of the inbox among them, and about how long one works.
STAGES, STAGE_SECONDS = 6, 1.5
#: How long a run may be without a process, before it begins and after it ended.
SILENCE_SECONDS = 60
#: In the environment of all that the benchmark starts.
MARK = "NIGHT_KILL"


# --- the reader


class Reader:
    """Reads the champion as somebody would who serves it; every failure after the first promotion counts."""

    def __init__(self, models: Path) -> None:
        self.models = models
        self.reads = self.before = self.deep = 0
        self.failures: list[str] = []
        self.seen: dict[str, tuple[dict[str, int], bytes]] = {}
        self.slowest_seconds = 0.0

    def look(self) -> None:
        """Read once."""
        began = time.monotonic()
        try:
            self._read()
        except Exception as error:
            if not self.seen:
                self.before += 1
                return
            self.failures.append(f"{datetime.now():%H:%M:%S} {type(error).__name__}: {error}")
            print(f"reader: {self.failures[-1]}", file=sys.stderr, flush=True)
        self.reads += 1
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)

    def _read(self) -> None:
        from tasks.bundle import load_bundle
        from tasks.engines import open_engine
        from tasks.registry import champion_path

        path = champion_path(self.models)
        bundle = load_bundle(path)
        if bundle.id != path.name:
            raise ValueError(f"{path} holds {bundle.id}")
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        new = bundle.id not in self.seen
        if new or self.reads % DEEP_EVERY == 0:
            images = np.random.default_rng(0).integers(0, 256, (8, bundle.decode.size, bundle.decode.size, 3), np.uint8)
            rows = open_engine(bundle, "openvino-float32").probabilities(images)
            if rows.shape != (8, len(bundle.classes)) or not np.allclose(rows.sum(1), 1, atol=1e-4):
                raise ValueError(f"{path} computes {rows}")
            digest = hashlib.sha256(rows.tobytes())
            for name in sorted(sizes):
                digest.update((path / name).read_bytes())
            self.deep += 1
            if new:
                self.seen[bundle.id] = (sizes, digest.digest())
            elif self.seen[bundle.id][1] != digest.digest():
                raise ValueError(f"{path} has changed")
        if self.seen[bundle.id][0] != sizes:
            raise ValueError(f"{path} has other files than before: {sizes}")

    def run(self) -> dict[str, Any]:
        """Read until standard input ends; return what was seen."""
        while not select.select([sys.stdin], [], [], READ_SECONDS)[0]:
            self.look()
        facts = {"reads": self.reads, "deep_reads": self.deep, "before_the_first": self.before}
        facts |= {"champions": len(self.seen), "slowest_seconds": round(self.slowest_seconds, 3)}
        return {**facts, "failures": len(self.failures), "examples": self.failures[:10]}


# --- images


@dataclass
class Inbox:
    """Drops images and remembers what must become of each content."""

    scratch: Scratch
    noise: np.random.Generator
    good: list[tuple[str, bytes]] = field(default_factory=list)
    bad: list[bytes] = field(default_factory=list)
    copies: int = 0

    def drop(self, count: int) -> None:
        """Put ``count`` new digits, as people do it: written elsewhere and moved in."""
        from sklearn.datasets import load_digits

        from tasks.images import encode_png

        digits = load_digits()
        for number in self.noise.integers(0, len(digits.images), count):
            pixels = digits.images[number] * 15 + self.noise.normal(0, 8, (8, 8))
            image = np.repeat(np.clip(pixels, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
            self.good.append((str(digits.target[number]), encode_png(image)))
            self._put(*self.good[-1])

    def drop_bad(self) -> None:
        """Put one that is no image, and one that was put before."""
        self.bad.append(b"\x89PNG\r\n\x1a\n" + self.noise.bytes(40))
        self._put("0", self.bad[-1])
        if len(self.good) > 20:
            self.copies += 1
            self._put(*self.good[int(self.noise.integers(0, 10))])

    def _put(self, class_name: str, data: bytes) -> None:
        folder = self.scratch.root / "data" / "inbox" / class_name
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{len(self.good)}-{len(self.bad)}-{self.copies}.png"
        aside = self.scratch.folder / name
        aside.write_bytes(data)
        aside.rename(folder / name)

    def waiting(self) -> int:
        return sum(path.is_file() for path in (self.scratch.root / "data" / "inbox").glob("*/*"))

    def account(self) -> dict[str, int]:
        """Return how many images are where, and how many are lost or there twice."""
        from tasks.archives import read_members

        data = self.scratch.root / "data"
        archived = Counter(
            (name.partition("/")[0], content(member))
            for archive in sorted((data / "additions").glob("[!.]*.tar"))
            for name, member in read_members(archive)
        )
        kept = Counter(content(path.read_bytes()) for path in (data / "quarantine").rglob("*.png"))
        good = [(class_name, content(image)) for class_name, image in self.good]
        bad = [content(image) for image in self.bad]
        counts = [archived[one] + kept[one[1]] for one in good] + [kept[one] for one in bad]
        return {
            "dropped": len(good),
            "dropped_bad": len(bad),
            "dropped_again": self.copies,
            "archived": sum(archived.values()),
            "archives": len(list((data / "additions").glob("[!.]*.tar"))),
            "quarantined": sum(kept.values()),
            "waiting": self.waiting(),
            "lost": sum(count == 0 for count in counts),
            "twice": sum(count > 1 for count in counts),
            "strangers": len(set(archived) - set(good)) + len(set(kept) - set(bad) - {one[1] for one in good}),
        }


def content(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- nights


class Night:
    """A night at work, started by ``nightly retrain``, or on the server for a ``nightly serve`` to run."""

    def __init__(self, scratch: Scratch, serving: "subprocess.Popen[bytes] | None", url: str) -> None:
        self.scratch, self.serving, self.url = scratch, serving, url
        self.began = time.monotonic()
        self.flow_run = ""
        self.asked, self.final = 0.0, None
        if serving is None:
            self.process = scratch.start("nightly", "retrain", log=scratch.folder / "retrain.log")
        else:
            deployment = ask(url, "GET", "/deployments/name/retrain/nightly")
            run = ask(url, "POST", f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
            self.flow_run = run["id"]

    def flow(self) -> psutil.Process | None:
        """Return the process of the flow run."""
        if self.serving is None:
            return psutil.Process(self.process.pid) if self.process.poll() is None else None
        for process in family(self.serving.pid)[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("spawn_main" in word for word in process.cmdline()):  # how Prefect's runner starts one
                    return process
        return None

    def stage(self) -> tuple[psutil.Process, str] | None:
        """Return the process of the stage that is at work, and its name."""
        top = self.process.pid if self.serving is None else self.serving.pid
        for process in family(top):
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if words[1:2] == ["-m"] and words[2].startswith("tasks."):
                    return process, words[3] if words[2] == "tasks.stand_in" else words[2].removeprefix("tasks.")
        return None

    def state(self) -> dict[str, Any] | None:
        """Return the final state on the server of a run that ``nightly serve`` started; None if it has none yet."""
        if self.final is None and time.monotonic() > self.asked + 0.5:
            self.asked = time.monotonic()
            with contextlib.suppress(httpx.TransportError):
                state = ask(self.url, "GET", f"/flow_runs/{self.flow_run}")["state"]
                self.final = state if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None
        return self.final

    def ended(self) -> bool:
        if self.serving is None:
            return self.process.poll() is not None
        return self.state() is not None

    def wait(self, limit_seconds: float) -> str:
        """Return how it ended, "" if well."""
        there = time.monotonic()
        while not self.ended():
            if time.monotonic() - self.began > limit_seconds:
                return f"did not end within {limit_seconds} s"
            if self.flow():
                there = time.monotonic()
            elif time.monotonic() - there > SILENCE_SECONDS:
                return "its process ended, which nobody told the server"
            time.sleep(0.2)
        if self.serving is None:
            code = self.process.returncode
            return "" if code == 0 else f"exit code {code}: {last_line(self.scratch.folder / 'retrain.log')}"
        state = self.state() or {}
        return "" if state["type"] == "COMPLETED" else f"{state['name']}: {state['message']}"


def ask(url: str, method: str, path: str, body: Any = None) -> Any:
    """Return what the server answers, which must be no error; a busy one is asked again, as by Prefect's clients."""
    for _ in range(20):
        answer = httpx.request(method, f"{url}{path}", json=body, timeout=30)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(1)
    return answer.raise_for_status().json()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


# --- the trial


@dataclass
class Kill:
    """One round.

    Attributes:
        at: the stage that was at work, or "between".
        outcome: how the night that was hit ended, "" if well.
        next_seconds: what the night after it took.
    """

    target: str
    by: str
    seconds_in: float
    at: str
    outcome: str
    server_away_seconds: float | None = None
    next_seconds: float = 0.0


class Trial:
    """The workspace, the server, the reader and what was seen."""

    def __init__(self, folder: Path, seed: int, database: str | None, real: bool) -> None:
        mark = f"{os.getpid()}-{time.time_ns()}"
        self.scratch = Scratch(folder, environment={MARK: mark, "OMP_NUM_THREADS": "1"}, stand_ins=not real)
        self.mark, self.moments = mark, random.Random(seed)
        self.inbox = Inbox(self.scratch, np.random.default_rng(seed))
        self.problems: list[str] = []
        self.kills: list[Kill] = []
        self.lengths: list[float] = []
        self.rounds = self.nights = 0
        # Due in half a day: no night starts by itself.
        due = datetime.now().astimezone() + timedelta(hours=12)
        self.scratch.edit("serve", cron=f"{due.minute} {due.hour} * * *", timezone=str(due.tzinfo or "UTC"))
        tolerant = {"class_recall_tolerance": 1.0, "calibration_tolerance": 1.0, "minimum_gain": 0.0}
        self.scratch.edit("retrain", keep=2, stop_grace_seconds=10, **tolerant)
        self.scratch.commit("the trial's parameters")
        self.scratch.git("push", "--quiet")
        self.server = Server(self.scratch, database)
        self.serving = self.scratch.start("nightly", "serve", log=folder / "serve.log")
        self._await_deployment()
        command = [sys.executable, __file__, "--read", str(self.scratch.root / "models")]
        self.reader = subprocess.Popen(
            command, env={**self.scratch.environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _await_deployment(self) -> None:
        began = time.monotonic()
        while True:
            try:
                ask(self.server.url, "GET", "/deployments/name/retrain/nightly")
                return
            except httpx.HTTPError:
                if time.monotonic() - began > 120 or self.serving.poll() is not None:
                    sys.exit(f"error: nightly serve did not start: {last_line(self.scratch.folder / 'serve.log')}")
                time.sleep(0.5)

    def tell(self, text: str) -> None:
        print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.tell(f"PROBLEM {text}")

    def prepare_round(self) -> None:
        """New images, and parameters that let models become better slowly, so that champions change."""
        self.rounds += 1
        self.inbox.drop(4)
        self.inbox.drop_bad()
        self.scratch.edit("train", learning_rate=round(2e-3 * 1.2**self.rounds, 6))

    def start(self, by: str) -> Night:
        self.nights += 1
        return Night(self.scratch, self.serving if by == "serve" else None, self.server.url)

    def night(self, by: str, what: str) -> float:
        """Run a night to its end, which must be a good one; return its seconds."""
        began = time.monotonic()
        if outcome := self.start(by).wait(NIGHT_LIMIT_SECONDS):
            self.problem(f"{what}: {outcome}")
        seconds = time.monotonic() - began
        # Only the first night knows no classes yet.
        if self.lengths and (left := self.inbox.waiting()):
            self.problem(f"{what}: {left} files were left in the inbox")
        return seconds

    def round(self, target: str, by: str) -> None:
        """Start nights until one is hit, then let the next one finish."""
        while True:
            self.prepare_round()
            night, moment = self.start(by), self.moments.uniform(0, 0.95 * min(self.lengths[-3:]))
            if kill := self._hit(night, target, by, moment):
                break
            self.tell(f"round {self.rounds}: {target} by {by}: the night was over before it was hit")
            if outcome := night.wait(NIGHT_LIMIT_SECONDS):
                self.problem(f"round {self.rounds}: undisturbed, {outcome}")
            self.lengths.append(time.monotonic() - night.began)
        what = f"round {self.rounds}: the night after the kill of the {target} ({kill.at}, by {by})"
        kill.next_seconds = round(self.night(by, what), 1)
        self.kills.append(kill)
        self.tell(f"round {self.rounds}: {asdict(kill)}")

    def _hit(self, night: Night, target: str, by: str, moment: float) -> Kill | None:
        stages: set[int] = set()
        wanted = self.moments.randint(1, STAGES) if target == "stage" else 0
        # A moment of the night, or of one of its stages, so that each of those has its turn.
        while len(stages) < wanted if wanted else time.monotonic() - night.began < moment:
            if night.ended():
                return None
            if wanted and (stage := night.stage()):
                stages.add(stage[0].pid)
            time.sleep(0.1)
        if wanted:
            time.sleep(self.moments.uniform(0, STAGE_SECONDS))
        self.inbox.drop(1)
        victim = None
        while victim is None:
            if night.ended():
                return None
            stage = night.stage()
            victim = {"stage": stage and stage[0], "flow": night.flow(), "server": self.server}[target]
            time.sleep(0.05)
        at = stage[1] if stage else "between"
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        kill = Kill(target, by, round(time.monotonic() - night.began, 2), at, "")
        if target == "server":
            kill.server_away_seconds = round(self.moments.uniform(1, 15), 1)
            time.sleep(kill.server_away_seconds)
            self.server.start()
        kill.outcome = night.wait(NIGHT_LIMIT_SECONDS)
        if target == "flow" and not kill.outcome:
            self.problem(f"round {self.rounds}: a killed flow is reported as a good night")
        return kill

    # --- the end

    def conclude(self) -> dict[str, Any]:
        """Look at everything once more; return what is to be printed."""
        reader = json.loads(self.reader.communicate(timeout=120)[0])
        if reader["failures"] or not reader["reads"]:
            self.problem(f"the reader failed {reader['failures']} times in {reader['reads']} reads")
        images = self.inbox.account()
        if images["lost"] or images["twice"] or images["waiting"] or images["strangers"]:
            self.problem(f"images: {images}")
        entries = [json.loads(line) for line in (self.scratch.root / "models/ledger.jsonl").read_text().splitlines()]
        at_work = self._at_work()
        doctor = json.loads(self.scratch.run("nightly", "doctor", "--json", check=False))
        for found in doctor:
            if found["state"] != "ok":
                self.problem(f"doctor: {found['name']}: {found['text']}")
        self._versions_agree()
        self._stop()
        killed = Counter(kill.target for kill in self.kills)
        return {
            "kills": dict(killed),
            "at": {target: dict(Counter(k.at for k in self.kills if k.target == target)) for target in TARGETS},
            "nights": self.nights,
            "night_seconds": round(statistics.median(self.lengths), 1),
            "night_after_seconds": round(statistics.median(kill.next_seconds for kill in self.kills), 1),
            "survived": {t: sum(not k.outcome for k in self.kills if k.target == t) for t in TARGETS},
            "reader": reader,
            "images": images,
            "ledger": dict(Counter(entry["action"] for entry in entries)),
            "runs_at_work": at_work,
            "doctor": {found["name"]: found["state"] for found in doctor},
            "rounds": [asdict(kill) for kill in self.kills],
            "problems": self.problems,
        }

    def _at_work(self) -> dict[str, int]:
        found = {}
        for kind in ("flow_runs", "task_runs"):
            states = {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}
            runs = ask(self.server.url, "POST", f"/{kind}/filter", {kind: {"state": states}, "limit": 200})
            found[kind] = len(runs)
            for run in runs:
                self.problem(f"on the server {run['name']} is {run['state']['name']} for ever ({kind})")
        return found

    def _versions_agree(self) -> None:
        """Git, DVC and the remote say the same."""
        status = json.loads(self.scratch.run("dvc", "status", "--json"))
        # Pruned models are said to be deleted.
        if stale := [name for name in status if not name.startswith("models/registry/")]:
            self.problem(f"dvc status: {stale}")
        if unknown := self.scratch.git("status", "--porcelain"):
            self.problem(f"git status: {unknown}")
        self.scratch.git("fsck", "--strict")
        heads = [self.scratch.git("rev-parse", name).strip() for name in ("HEAD", "origin/main")]
        heads.append(output(["git", "rev-parse", "main"], self.scratch.upstream).strip())
        if len(set(heads)) != 1:
            self.problem(f"git: HEAD, origin/main and the upstream are {heads}")
        clone = self.scratch.folder / "clone"
        output(["git", *PERSON, "clone", "--quiet", str(self.scratch.upstream), str(clone)], self.scratch.folder)
        output(self.scratch.command("dvc", "pull", "--quiet"), clone, self.scratch.environment)
        for folder in ("models/registry", "data/additions"):
            ours = {path.stem for path in (self.scratch.root / folder).glob("*.dvc")}
            theirs = {path.name for path in (clone / folder).glob("[!.]*") if path.suffix != ".dvc"}
            if ours - theirs:
                self.problem(f"a clone lacks {sorted(ours - theirs)} of {folder}")

    def _stop(self) -> None:
        self.serving.terminate()
        self.serving.wait(60)
        self.server.stop()
        deadline = time.monotonic() + 20
        while (left := self._marked()) and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in left:
            self.problem(f"a process is left over: {' '.join(process.cmdline())}")
            process.kill()

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    trial = Trial(folder, options.seed, options.database, options.real)
    try:
        trial.tell(f"the server is {trial.server.url}, the workspace {trial.scratch.root}")
        for by in ("retrain", "serve"):
            trial.prepare_round()
            seconds = trial.night(by, f"the first night by {by}")
            trial.lengths.append(seconds)
            trial.tell(f"a night by {by} took {seconds:.0f} s")
        plan = [target for target in TARGETS for _ in range(options.kills)]
        trial.moments.shuffle(plan)
        count = Counter()
        for target in plan:
            count[target] += 1
            trial.round(target, "serve" if count[target] % 2 else "retrain")
        trial.scratch.commit("parameters")
        trial.scratch.git("push", "--quiet")
        trial.night("retrain", "the last night")
        return trial.conclude()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in trial._marked():
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--database", help="postgresql+asyncpg://user:password@host/name; SQLite by default")
    parser.add_argument("--real", action="store_true", help="the real stages; four times as long")
    parser.add_argument("--folder", type=Path, help="keep everything there")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(Reader(options.read).run()))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        found = run(options.folder or Path(temporary) / "trial", options)
    versions = {name: metadata.version(name) for name in ("prefect", "dvc")}
    database = (options.database or "sqlite").partition(":")[0]
    print(json.dumps({"seed": options.seed, "database": database, **versions, **found}, indent=2, ensure_ascii=False))
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
