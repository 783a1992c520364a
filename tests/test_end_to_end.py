"""The whole thing in a fresh copy of the project: dvc repro, what an edit rebuilds, the nightly run, prediction."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAGES = ["download", "prepare", "augment", "train", "export", "evaluate"]
#: Every Python process that finds it on its path notes whom it wants to talk to, and talks to this machine alone.
NO_NETWORK = """
import os, sys

def listen(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"):
        with open(os.environ["STRANGERS"], "a") as file:
            print(host, *sys.argv[:3], file=file)
        raise OSError(101, "Network is unreachable")

sys.addaudithook(listen)
"""
#: What a log without an error line has nowhere.
TROUBLE = re.compile(r"\b(ERROR|CRITICAL|Traceback|[Ee]rror:|database is locked)")


class Workspace:
    """A copy of the project as a user would have cloned it, with a very short training."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        binaries = Path(sys.executable).parent
        self.strangers = home.with_name("strangers")
        home.with_name("no_network").mkdir()
        (home.with_name("no_network") / "sitecustomize.py").write_text(NO_NETWORK)
        # Whether telemetry is off is this software's own doing, not that of the tests.
        opted_out = ("DO_NOT_TRACK", "DVC_NO_ANALYTICS")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", *opted_out))},
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(home),
            "PYTHONPATH": f"{root}{os.pathsep}{home.with_name('no_network')}",
            "STRANGERS": str(self.strangers),
            "COLUMNS": "160",
        }

    def run(self, *command: str) -> str:
        """Run a command to its end and return what it printed; a failure shows all of it."""
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        assert not TROUBLE.search(done.stdout), done.stdout
        return done.stdout

    def edit(self, section: str, **values: object) -> None:
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params[section] = {**(params.get(section) or {}), **values}
        path.write_text(yaml.safe_dump(params))

    def stale(self) -> set[str]:
        """Return the stages that DVC holds for out of date by themselves, not by what comes before them."""
        return set(json.loads(self.run("dvc", "status", "--json")))

    def json(self, *parts: str) -> dict:
        return json.loads(self.root.joinpath(*parts).read_text())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("clone") / "resnet-nightly"
    tracked = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, target)
    space = Workspace(root, tmp_path_factory.mktemp("machine") / "prefect")
    space.run("git", "init", "--quiet")
    space.edit("train", epochs=1, batch_size=128)
    space.edit("retrain", accuracy_floor=0.0)
    space.output = space.run("dvc", "repro")
    return space


def test_repro_builds_every_artifact_of_the_contract(workspace):
    for name in STAGES:
        assert f"Running stage '{name}'" in workspace.output
    expected = [
        "data/raw/source.json", "data/card.html", "data/prepared/manifest.parquet",
        "data/prepared/train/images.npy", "data/augmentations.png", "models/candidate/model.keras",
        "models/candidate/history.csv", "models/exported/engines/openvino/model.xml",
        "models/evaluation/metrics.json", "models/evaluation/report.html", "models/evaluation/plots/confusion.csv",
    ]  # fmt: skip
    for name in expected:
        assert (workspace.root / name).stat().st_size > 0, name
    assert sum(workspace.json("data", "prepared", "prepared.json")["counts"].values()) == 1797
    metrics = workspace.json("models", "evaluation", "metrics.json")
    assert metrics["model_id"] == workspace.json("models", "exported", "bundle.json")["id"]
    assert workspace.json("models", "exported", "bundle.json")["engines"]["openvino-float32"]["agreement"] >= 0.995


def test_a_second_repro_has_nothing_to_do(workspace):
    started = time.monotonic()
    output = workspace.run("dvc", "repro")
    seconds = time.monotonic() - started
    assert "up to date" in output
    assert "Running stage" not in output
    assert seconds < 6, "1.0 s on an idle machine; far more means that something is computed"


@pytest.mark.parametrize(
    ("section", "values", "stages"),
    [
        ("download", {"source": "folder", "path": "/nowhere"}, {"download"}),
        ("prepare", {"minimum_images_per_class": 11}, {"prepare"}),
        ("augment", {"shift_pixels": 0}, {"augment", "train"}),
        ("model", {"dropout": 0.1}, {"train"}),
        ("train", {"seed": 7}, {"train"}),
        ("export", {"accepted_precision": 0.9}, {"export"}),
        ("predict", {"top_k": 1}, set()),
        ("retrain", {"minimum_gain": 0.5}, set()),
        ("serve", {"cron": "0 3 * * *"}, set()),
    ],
)
def test_an_edit_makes_exactly_its_stages_stale(workspace, section, values, stages):
    params = (workspace.root / "params.yaml").read_text()
    try:
        workspace.edit(section, **values)
        assert workspace.stale() == stages
    finally:
        (workspace.root / "params.yaml").write_text(params)
    assert workspace.stale() == set()


def test_an_edit_of_an_evaluation_setting_rebuilds_evaluation_alone(workspace):
    before = (workspace.root / "models/exported/bundle.json").stat().st_mtime_ns
    evaluate = {"pictures": 3}
    workspace.edit("evaluate", **evaluate)
    output = workspace.run("dvc", "repro")
    ran = [name for name in STAGES if f"Running stage '{name}'" in output]
    assert ran == ["evaluate"]
    assert (workspace.root / "models/exported/bundle.json").stat().st_mtime_ns == before


def test_the_nightly_run_promotes_the_first_model_and_classifies_a_folder(workspace):
    output = workspace.run("nightly", "retrain", "--predict", "data/prepared/examples")
    model_id = workspace.json("models", "exported", "bundle.json")["id"]
    assert workspace.json("models", "champion.json")["id"] == model_id
    bundle = workspace.root / "models" / "registry" / model_id
    assert (bundle / "model.keras").is_file()
    assert (bundle.parent / f"{model_id}.dvc").is_file()
    ledger = (workspace.root / "models" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in ledger] == ["promote"]
    tables = list((workspace.root / "data" / "predictions").glob("*/predictions.parquet"))
    assert len(tables) == 1
    examples = list((workspace.root / "data/prepared/examples").rglob("*.png"))
    table = pd.read_parquet(tables[0])
    assert len(table) == len(examples) == 40
    assert set(table.status) == {"ok"}
    assert set(table.model_id) == {model_id}
    accuracy = workspace.json("models", "evaluation", "metrics.json")["accuracy"]
    assert f"{accuracy:.2%}" in output
    for shown in ("predictions.parquet", "report.html"):
        assert shown in output


def test_the_commands_work_on_the_champion(workspace):
    model_id = workspace.json("models", "champion.json")["id"]
    assert model_id in workspace.run("nightly", "history")
    assert "4 (4 ok)" in workspace.run("nightly", "predict", "data/prepared/examples/1", "--out", "somewhere")
    table = pd.read_csv(workspace.root / "somewhere" / "predictions.csv")
    assert len(table) == 4


def test_the_logs_have_no_error_line(workspace):
    logs = {path.name: path.read_text() for path in (workspace.root / ".nightly" / "logs").rglob("*.log")}
    assert "server.log" in logs
    assert {name: TROUBLE.findall(text) for name, text in logs.items() if TROUBLE.search(text)} == {}


def test_nothing_of_all_this_wants_to_talk_to_another_machine(workspace):
    assert not workspace.strangers.exists(), workspace.strangers.read_text()
    program = "import socket; socket.create_connection(('example.org', 80))"
    done = subprocess.run([sys.executable, "-c", program], env=workspace.environment, capture_output=True, text=True)
    assert "Network is unreachable" in done.stderr
    assert workspace.strangers.read_text().startswith("example.org")
