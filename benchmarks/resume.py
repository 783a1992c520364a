"""A training killed with SIGKILL before, in and after the writing of a checkpoint, against one that nobody disturbed.

``.venv/bin/python benchmarks/resume.py [--backbone resnet20] [--epochs 12]`` trains on the embedded digits, as DVC runs
the stage, and prints one JSON object: where each attempt was killed, and how far the final models are apart.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent


def stage(name: str, *arguments: object) -> "subprocess.Popen[str]":
    """Start a stage as DVC does."""
    command = [sys.executable, "-m", f"tasks.{name}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child: "subprocess.Popen[str]") -> str:
    """Return all that a stage still says; it must succeed."""
    output = child.communicate()[0]
    if child.returncode:
        sys.exit(f"error: a stage failed: {output}")
    return output


def kill(child: "subprocess.Popen[str]", checkpoints: Path, moment: str, wait_seconds: float) -> None:
    """Kill a training once it has trained for a while: between checkpoints, in the writing of one, or right after."""
    assert child.stdout
    while "epoch " not in child.stdout.readline():  # compiled by now
        if child.poll() is not None:
            sys.exit("error: the training ended before it could be killed")
    time.sleep(wait_seconds)

    def stamps() -> set[tuple[str, int]]:
        return {(str(path), path.stat().st_mtime_ns) for path in checkpoints.glob("*/[ab].npz")}

    before = stamps()
    while child.poll() is None:
        if moment == "between" or (moment == "in" and any(checkpoints.glob("*/.*partial*"))):
            break
        if moment == "after" and stamps() - before:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    if child.returncode != -signal.SIGKILL:
        sys.exit(f"error: the training ended by itself before it could be killed {moment} the writing of a checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet20")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sections = {
            "download": {"source": "digits"},
            "prepare": {"decode": {"size": 16}, "normalization": "standardize", "test_fraction": 0.2},
            "augment": {"flip_horizontal": False, "shift_pixels": 1, "eraser": {"p": 0.25}},
            "model": {"backbone": options.backbone, "doublings": 1, "batch_normalization_momentum": 0.9},
            "train": {
                "epochs": options.epochs,
                "optimizer": "sgd",
                "learning_rate": 0.05,
                "cutmix_alpha": 1.0,
                "ema_momentum": 0.99,
                "checkpoint_seconds": 0.2,
            },
        }
        params = work / "params.yaml"
        params.write_text(yaml.safe_dump(sections))
        os.chdir(work)
        finish(stage("download", "--out", "raw", "--params", params))
        finish(
            stage(
                "prepare",
                "--raw",
                "raw",
                "--additions",
                "none",
                "--out",
                "prepared",
                "--card",
                "c.html",
                "--params",
                params,
            )
        )
        outputs = ["--out", "augmented", "--preview", "preview.png"]
        finish(stage("augment", "--prepared", "prepared", *outputs, "--params", params))

        def train(name: str) -> "subprocess.Popen[str]":
            inputs = ["--prepared", "prepared", "--augmented", "augmented", "--models", "none", "--params", params]
            return stage("train", *inputs, "--out", name, "--scratch", f"scratch-{name}")

        finish(train("whole"))
        attempts = []
        for moment in ("between", "in", "after"):
            child = train("cut")
            kill(child, work / "scratch-cut" / "checkpoints", moment, moments.uniform(0, 3))
            left = sorted(path.name for path in (work / "scratch-cut" / "checkpoints").glob("*/*"))
            attempts.append({"killed": moment, "files_left": left, "model_left": (work / "cut").exists()})
        said = finish(train("cut"))
        attempts[-1]["then"] = next((line for line in said.splitlines() if "going on" in line), "started anew")
        facts = [json.loads((work / name / "bundle.json").read_text()) for name in ("whole", "cut")]
        history = [pd.read_csv(work / name / "history.csv").drop(columns="seconds") for name in ("whole", "cut")]
        print(
            json.dumps(
                {
                    "backbone": options.backbone,
                    "epochs": [len(table) for table in history],
                    "attempts": attempts,
                    "model_ids": [found["id"] for found in facts],
                    "validation_accuracy": [found["training"]["validation_accuracy"] for found in facts],
                    "largest_history_difference": float(np.abs(history[0].to_numpy() - history[1].to_numpy()).max()),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
