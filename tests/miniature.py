"""Models that are only files, and a workspace with git, DVC and three quick stages in place of the real ones."""

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

from tasks.bundle import MODEL_FILE, Bundle
from tasks.files import write_json

STAGES = """
    stages:
      download:
        cmd: python work.py download
        deps: [source.txt]
        outs: [data/raw]
      train:
        cmd: python work.py train
        deps: [data/raw, knobs.json]
        outs: [models/exported]
      evaluate:
        cmd: python work.py evaluate
        deps: [models/exported]
        outs: [models/evaluation/predictions.parquet, models/evaluation/report.html]
        metrics:
        - models/evaluation/metrics.json:
            cache: false
"""

WORK = """
    import json, os, pathlib, signal, sys, time
    from fake_predictions import write_predictions

    def write(path, content):
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    knobs = json.loads(pathlib.Path("knobs.json").read_text())

    if sys.argv[1] == "download":
        failures = pathlib.Path("failures")
        if failures.exists() and (left := int(failures.read_text())):
            failures.write_text(str(left - 1))
            sys.exit("error: the network is down")
        print("downloading")
        write("data/raw/archive", "bytes")

    if sys.argv[1] == "train":
        checkpoint = pathlib.Path("checkpoint")
        step = int(checkpoint.read_text()) if checkpoint.exists() else 0

        def stop(*_):
            time.sleep(0.5)
            checkpoint.write_text(str(step))
            print(f"interrupted: stopped at step {step}", file=sys.stderr, flush=True)
            os._exit(75)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        print(f"epoch 1/1: from step {step}")
        if knobs["accuracy"] is None:
            sys.exit("error: train.learning_rate is too large: the loss is not finite")
        while step < knobs["steps"]:
            step += 1
            if step == knobs["interrupted_at"]:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        bundle = {"format": 1, "id": knobs["id"], "created": "2026-01-01T00:00:00+00:00"}
        bundle |= {"classes": knobs["classes"], "decode": {"size": 8}, "normalization": {}, "parameters": {}}
        bundle |= {"data_digest": "d1", "test_digest": knobs["test_digest"], "libraries": {}, "training": {}}
        write("models/exported/bundle.json", bundle)
        write("models/exported/model.keras", knobs["id"])

    if sys.argv[1] == "evaluate":
        metrics = {"model_id": knobs["id"], "test_digest": knobs["test_digest"], "test_images": 100}
        metrics |= {"accuracy": knobs["accuracy"], "top5_error": 0.0, "log_loss": 0.1, "calibration_error": 0.02}
        metrics |= {"per_class": {name: {} for name in knobs["classes"]}}
        write("models/evaluation/metrics.json", metrics)
        write("models/evaluation/report.html", "<p>report")
        write_predictions(pathlib.Path("models/evaluation"), knobs["accuracy"], knobs["classes"])
"""

PREDICT = """
    import argparse, json, pathlib
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=pathlib.Path)
    for name in ("--out", "--model", "--params"):
        parser.add_argument(name, type=pathlib.Path, required=True)
    args = parser.parse_args()
    files = sorted(path.name for path in args.source.iterdir())
    args.out.mkdir(parents=True)
    model = json.loads((args.model / "bundle.json").read_text())["id"]
    (args.out / "predictions.parquet").write_text(f"{files} by {model}")
    facts = {"files": len(files), "engine": "openvino", "statuses": {"ok": len(files)}, "labels": {"a": len(files)}}
    (args.out / "summary.json").write_text(json.dumps(facts))
    print("classified", len(files), "files")
"""

EVALUATE = """
    import argparse, json, pathlib, sys
    from fake_predictions import write_predictions
    parser = argparse.ArgumentParser()
    for name in ("--exported", "--prepared", "--out", "--params"):
        parser.add_argument(name, type=pathlib.Path, required=True)
    args = parser.parse_args()
    metrics = json.loads((args.exported / "evaluation" / "metrics.json").read_text())
    knobs = json.loads(pathlib.Path("knobs.json").read_text())
    if knobs["champion_accuracy"] is None:
        sys.exit("error: the champion wants images of 16 px, but these have 8 px")
    metrics |= {"accuracy": knobs["champion_accuracy"], "test_digest": knobs["test_digest"]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metrics.json").write_text(json.dumps(metrics))
    write_predictions(args.out, knobs["champion_accuracy"], knobs["classes"])
    print("measured", metrics["model_id"])
"""


def metrics(model_id: str, accuracy: float, classes: str = "ab", test_digest: str = "t1") -> dict:
    return {
        "model_id": model_id,
        "test_digest": test_digest,
        "accuracy": accuracy,
        "per_class": {name: {} for name in classes},
    }


def write_predictions(evaluation, accuracy, classes):
    """Write which of 100 test images a model gets right: the first ones, so of two models one has all of the other's.

    The fake stages run this very text, with nothing of this package round it.
    """
    import pyarrow
    from pyarrow import parquet

    targets = [classes[number % len(classes)] for number in range(100)]
    correct = [number < round(100 * accuracy) for number in range(100)]
    table = pyarrow.table({"target": targets, "correct": correct})
    parquet.write_table(table, evaluation / "predictions.parquet")


def export(root: Path, model_id: str, accuracy: float = 0.9) -> tuple[Path, Path]:
    """Write what the stages export and evaluate leave behind."""
    exported, evaluation = root / "exported", root / "evaluation"
    exported.mkdir(parents=True, exist_ok=True)
    evaluation.mkdir(exist_ok=True)
    Bundle(
        path=exported,
        format=1,
        id=model_id,
        created="2026-01-01T00:00:00+00:00",
        classes=["a", "b"],
        decode={"size": 8},
        normalization={"mode": "unit"},
        parameters={},
        data_digest=f"data-of-{model_id}",
        test_digest="t1",
        libraries={},
        training={},
    ).save()
    (exported / MODEL_FILE).write_text(f"weights of {model_id}")
    write_json(evaluation / "metrics.json", metrics(model_id, accuracy))
    (evaluation / "report.html").write_text("<p>report")
    write_predictions(evaluation, accuracy, "ab")
    return exported, evaluation


class Miniature:
    """The workspace at ``root``; its ``knobs.json`` says what model comes out: id, accuracy, classes, test digest;
    and how the training goes: ``steps`` of 0.05 s, and at which one it gets a signal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for path, content in {
            "dvc.yaml": STAGES,
            "work.py": WORK,
            "fake_predictions.py": inspect.getsource(write_predictions),
            "tasks/__init__.py": "",
            "tasks/predict.py": PREDICT,
            "tasks/evaluate.py": EVALUATE,
            "params.yaml": "retrain: {download_retry_delay_seconds: 0}\n",
            "source.txt": "somewhere",
        }.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(textwrap.dedent(content))
        (root / "data" / "incoming").mkdir(parents=True)
        self.set(id="m1", accuracy=0.9, classes=["a", "b"], test_digest="t1", champion_accuracy=None)
        self.set(steps=0, interrupted_at=None)
        subprocess.run(["git", "init", "--quiet", str(root)], check=True)
        subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=root, check=True)

    def set(self, **knobs) -> None:
        """Turn some knobs."""
        file = self.root / "knobs.json"
        present = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(present | knobs))

    def incoming(self, *names: str) -> None:
        """Put files into data/incoming."""
        for name in names:
            (self.root / "data" / "incoming" / name).write_bytes(b"pixels")
