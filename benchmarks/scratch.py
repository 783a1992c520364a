"""A workspace of its own with a very small night, and a Prefect server of its own, for the benchmarks of the flows."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
PERSON = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
#: All of the real stages, as small as they get: 1,797 digits at 8 px, one epoch.
SECTIONS = {
    "inbox": {"settle_seconds": 0},
    "prepare": {"decode": {"size": 8}, "normalization": "standardize", "validation_fraction": 0.1},
    "model": {"backbone": "resnet20", "doublings": 0, "batch_normalization_momentum": 0.9},
    "train": {"epochs": 1, "batch_size": 128, "optimizer": "adam", "learning_rate": 0.001},
    "export": {"int8": False, "minimum_agreement": 0.9, "maximum_loss": 0.1},
    "retrain": {"accuracy_floor": 0.0, "publish": "push"},
}
#: Put behind the copy's code: a network that is built and converted in a second, where the backbone stands.
TINY_NETWORK = """

def _backbone(params, size):
    import keras

    images = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(8, 3, strides=4)(images)
    x = keras.layers.BatchNormalization(momentum=params.batch_normalization_momentum)(x)
    return keras.Model(images, keras.layers.ReLU()(x), name="tiny")
"""


@dataclass
class Scratch:
    """A copy of what this project has committed, in ``folder``, with git, a bare upstream repository and a DVC remote.

    Attributes:
        environment: of every process that works in it.
        tiny: put a network of one convolution in place of the real ones.
        stand_ins: put the stages of ``benchmarks/stand_in.py`` in place of those that need a deep-learning library.
        sections: what to change of the digits preset.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    tiny: bool = True
    stand_ins: bool = False
    sections: dict[str, dict[str, Any]] = field(default_factory=lambda: SECTIONS)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        own = {"PATH": programs, "PYTHONPATH": str(self.root), "PREFECT_HOME": str(self.folder / "prefect")}
        quiet = {"NO_COLOR": "1", "COLUMNS": "160", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        self.environment = {**inherited, **own, **quiet, **self.environment}
        # What is committed: a benchmark that others edit meanwhile measures nothing.
        output(["git", "archive", "--output", str(self.folder / "project.tar"), "HEAD"], ROOT)
        shutil.unpack_archive(self.folder / "project.tar", self.root, filter="data")
        if self.tiny:
            with (self.root / "tasks" / "classifier.py").open("a") as file:
                file.write(TINY_NETWORK)
        if self.stand_ins:
            shutil.copy(ROOT / "benchmarks" / "stand_in.py", self.root / "tasks")
            graph = (self.root / "dvc.yaml").read_text()
            for stage in ("augment", "train", "export", "evaluate"):
                graph = graph.replace(f"python -m tasks.{stage} ", f"python -m tasks.stand_in {stage} ")
            (self.root / "dvc.yaml").write_text(graph)
        for section, values in self.sections.items():
            self.edit(section, **values)
        self.git("init", "--quiet", "--initial-branch", "main")
        self.git("init", "--quiet", "--bare", "--initial-branch", "main", str(self.upstream))
        self.git("remote", "add", "origin", str(self.upstream))
        self.commit("start")
        self.git("push", "--quiet", "--set-upstream", "origin", "main")

    @property
    def root(self) -> Path:
        return self.folder / "workspace"

    @property
    def upstream(self) -> Path:
        return self.folder / "upstream.git"

    def edit(self, section: str, **values: object) -> None:
        """Change some parameters of a section."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params[section] = {**(params.get(section) or {}), **values}
        path.write_text(yaml.safe_dump(params, sort_keys=False))

    def commit(self, message: str) -> None:
        """Commit all changes, as a person would."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    def git(self, *arguments: str) -> str:
        return output(["git", *PERSON, *arguments], self.root)

    def command(self, *words: str) -> list[str]:
        """Return how a command of this software, of DVC or of Prefect is called."""
        module = {"nightly": "flows.cli"}.get(words[0], words[0])
        return [sys.executable, "-m", module, *words[1:]]

    def start(self, *words: str, log: Path) -> "subprocess.Popen[bytes]":
        """Start such a command; ``log`` receives what it prints."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(*words),
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *words: str, check: bool = True) -> str:
        """Return what such a command printed."""
        return output(self.command(*words), self.root, self.environment, check=check)

    def json(self, *parts: str) -> Any:
        return json.loads(self.root.joinpath(*parts).read_text(encoding="utf-8"))


class Server:
    """A Prefect server on a free port of this machine, with its data in the scratch folder or in ``database``."""

    def __init__(self, scratch: Scratch, database: str | None = None) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.scratch, self.log = scratch, scratch.folder / "server.log"
        if database:
            scratch.environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        scratch.environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
        self.start()
        scratch.environment["PREFECT_API_URL"] = self.url

    def start(self) -> float:
        """Start it and return the seconds until it answered."""
        began = time.monotonic()
        words = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port), "--no-ui")
        self.process = self.scratch.start(*words, log=self.log)
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > began + 120:
                sys.exit(f"error: the Prefect server does not answer: see {self.log}")
            time.sleep(0.2)
        return time.monotonic() - began

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """End it with SIGKILL, and all that it started."""
        for process in family(self.process.pid):
            process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all below it; none if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def output(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None, check: bool = True) -> str:
    """Return the standard output of a command; exits with all that it said if it fails."""
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if check and done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
