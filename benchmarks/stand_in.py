"""In place of the stages that need a deep-learning library: the same files from a softmax regression, in a second each.

``benchmarks/scratch.py`` copies this into a workspace as ``tasks/stand_in.py``; it is called as the real stages are.
"""

import argparse
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundle import Bundle, load_bundle, model_id
from tasks.data import load_split
from tasks.files import publish_directory, read_json, write_json, write_text
from tasks.params import read_params_file

STEPS, STEP_SECONDS = 50, 0.02


def augment(prepared: Path, out: Path, preview: Path) -> None:
    preview.touch()
    with publish_directory(out) as partial:
        write_json(partial / "summary.json", {"images": len(load_split(prepared, "train").images)})


def train(prepared: Path, out: Path, rate: float) -> None:
    """Descend the gradient, with pauses in which to be killed."""
    split, facts = load_split(prepared, "train"), read_json(prepared / "prepared.json")
    pixels, targets = _pixels(split.images), np.asarray(split.targets)
    weights, bias = np.zeros((pixels.shape[1], targets.shape[1]), np.float32), np.zeros(targets.shape[1], np.float32)
    for _ in range(STEPS):
        error = (_softmax(pixels @ weights + bias) - targets) / len(targets)
        weights -= rate * pixels.T @ error
        bias -= rate * error.sum(0)
        time.sleep(STEP_SECONDS)
    with publish_directory(out) as partial:
        classes, normalization = read_json(prepared / "classes.json"), read_json(prepared / "normalization.json")
        bundle = Bundle(
            path=partial,
            format=1,
            id="",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            classes=classes,
            decode=facts["decode"],
            normalization=normalization,
            parameters={},
            data_digest=facts["data_digest"],
            test_digest=facts["test_digest"],
            libraries={},
            training={},
        )
        bundle.changed(id=model_id([weights, bias], classes, bundle.decode, normalization)).save()
        with bundle.model_file.open("wb") as file:
            np.savez(file, weights=weights, bias=bias)
        write_text(partial / "history.csv", "epoch,loss,val_loss,accuracy,val_accuracy\n1,1,1,0.5,0.5\n")
    print(f"trained model {load_bundle(out).id}")


def export(candidate: Path, out: Path) -> None:
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino
    from openvino import opset13 as ops

    with publish_directory(out) as partial:
        shutil.copytree(candidate, partial, dirs_exist_ok=True)
        bundle = load_bundle(partial)
        with np.load(bundle.model_file) as saved:
            weights, bias = saved["weights"], saved["bias"]
        size = bundle.decode.size
        images = ops.parameter([-1, size, size, 3], np.uint8, name="images")
        pixels = ops.divide(ops.convert(images, "f32"), np.float32(255))
        rows = ops.reshape(pixels, np.array([-1, len(weights)], np.int64), False)
        logits = ops.add(ops.matmul(rows, weights, False, False), bias)
        bundle.openvino_file.parent.mkdir(parents=True)
        model = openvino.Model([ops.softmax(logits, 1)], [images], "stand-in")
        openvino.save_model(model, bundle.openvino_file, compress_to_fp16=False)
        evidence = {"accuracy": 0.5, "agreement": 1.0, "accuracy_lost": 0.0, "max_difference": 0.0}
        offered = {**evidence, "offered": True, "images_per_second": 1000.0}
        bundle.changed(engines={"openvino-float32": offered}, threshold=0.5).save()


def evaluate(exported: Path, prepared: Path, out: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    bundle, split = load_bundle(exported), load_split(prepared, "test")
    with np.load(bundle.model_file) as saved:
        rows = _softmax(_pixels(split.images) @ saved["weights"] + saved["bias"])
    actual, found = np.asarray(split.targets).argmax(1), rows.argmax(1)
    correct = actual == found
    scores = {
        name: {"precision": 0.5, "recall": float(correct[actual == number].mean()), "f1": 0.5}
        | {"images": int((actual == number).sum())}
        for number, name in enumerate(bundle.classes)
    }
    figures: dict[str, Any] = {
        "model_id": bundle.id,
        "test_digest": read_json(prepared / "prepared.json")["test_digest"],
        "test_images": len(actual),
        "mistakes": int((~correct).sum()),
        "accuracy": round(float(correct.mean()), 6),
        "top5_error": 0.1,
        "log_loss": round(float(-np.log(rows[np.arange(len(actual)), actual]).mean()), 6),
        "calibration_error": 0.02,
        "per_class": scores,
        "engines": {"openvino-float32": {"agreement": 1.0, "accuracy_lost": 0.0, "passed": True}},
    }
    targets = [bundle.classes[number] for number in actual]
    (out / "plots").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"target": targets, "correct": correct}), out / "predictions.parquet")
    pairs = "".join(f"{bundle.classes[a]},{bundle.classes[f]}\n" for a, f in zip(actual, found, strict=True))
    write_text(out / "plots" / "confusion.csv", f"actual,predicted\n{pairs}")
    write_text(out / "plots" / "calibration.csv", "confidence,accuracy\n0.5,0.5\n")
    recalls = "".join(f"{name},{found['recall']}\n" for name, found in scores.items())
    write_text(out / "plots" / "classes.csv", f"class,recall\n{recalls}")
    write_text(out / "report.html", f"<p>{bundle.id}")
    write_json(out / "metrics.json", figures)


def _pixels(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float32).reshape(len(images), -1) / 255


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["augment", "train", "export", "evaluate"])
    for name in ("prepared", "augmented", "candidate", "exported", "models", "scratch", "out", "preview"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    if args.stage == "augment":
        augment(args.prepared, args.out, args.preview)
    elif args.stage == "train":
        train(args.prepared, args.out, read_params_file(args.params)["train"]["learning_rate"])
    elif args.stage == "export":
        export(args.candidate, args.out)
    else:
        evaluate(args.exported, args.prepared, args.out)


if __name__ == "__main__":
    main()
