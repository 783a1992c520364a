"""What a GPU does with this project: correctness, speed, and time to accuracy from scratch on CIFAR-10.

``.venv/bin/python benchmarks/gpu.py --source DIRECTORY_OR_ARCHIVE [--minutes 8] [--out models/gpu]``

``--source`` is CIFAR-10 as class folders (a directory or an archive of ``train/<class>/…`` and ``test/<class>/…``);
without it the last part is left out. Runs on Keras's TensorFlow and JAX backends (with ``KERAS_BACKEND=jax``
TensorFlow need not be installed). Tables go to stderr, one JSON object to stdout, the trained bundle with its history
to ``--out``.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

# This script stands beside it, so Python finds it.
from train_step import CLASSES, NORMALIZATION, SideBySide, noise

from tasks.augmentation import AugmentParams, EraserParams
from tasks.checkpoint import Checkpoints
from tasks.classifier import ModelParams
from tasks.device import prepare_device
from tasks.loop import Job, Loop, out_of_memory
from tasks.machine import choose
from tasks.optimizers import make_loss
from tasks.recipe import TrainParams
from tasks.train import Data, Run, Scratch

AUGMENT = AugmentParams(flip_horizontal=True, shift_pixels=4, eraser=EraserParams(p=0.5))
SPEED_GOAL = {"pixels": 256, "images_per_second": 4000}
ACCURACY_GOAL = 0.955


def say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def job_for(device: Any, data: Any, params: TrainParams, model: ModelParams) -> Job:
    """Return what the loop needs to train ``model`` on ``data``."""
    machine = choose(params, device, data.images)
    facts = Data(data, data, [str(number) for number in range(CLASSES)], {"normalization": NORMALIZATION})
    run = Run(facts, Path(), params, model, AUGMENT, device, machine, Scratch.under(Path()))
    return Job(data, data, make_loss(params), lambda low, parts: run.learner(None, low, parts), machine.data_on_device)


def correctness(device: Any) -> dict[str, float]:
    """Train the same steps in float32 and in mixed bfloat16, on images that can be learned; compare the losses."""
    data = noise(512, 32)
    data.images[:] //= 2
    for number in range(len(data.images)):  # a bright stripe tells the class
        row = 3 * int(data.targets[number].argmax())
        data.images[number, row : row + 3] = 255
    losses = {}
    for precision in ("float32", "mixed_bfloat16"):
        # At higher rates so young a network amplifies any rounding: losses 48 % apart at 0.01, 6 % at 0.001.
        params = TrainParams(
            epochs=6, batch_size=128, optimizer="sgd", learning_rate=0.001, precision=precision, checkpoint_seconds=1e9
        )
        model = ModelParams(backbone="resnet50", doublings=1, batch_normalization_momentum=0.9)
        with tempfile.TemporaryDirectory() as folder:
            rows = Loop(job_for(device, data, params, model), params, Checkpoints(Path(folder), "check")).run().rows
        losses[precision] = [row["loss"] for row in rows]
    exact, rounded = (np.array(losses[name]) for name in ("float32", "mixed_bfloat16"))
    difference = float(np.abs(rounded / exact - 1).max())
    say(f"loss by epoch in float32 {exact.round(4)}, in mixed bfloat16 {rounded.round(4)}: {difference:.2%} apart")
    if not (exact[-1] < exact[0] and rounded[-1] < rounded[0] and difference < 0.1):
        sys.exit(f"error: mixed bfloat16 does not train as float32 does: {losses}")
    return {"largest_loss_difference": round(difference, 4)}


def speed(device: Any, pixels: int, batch_size: int, steps: int, rounds: int) -> dict[str, Any]:
    """Return images a second of the product's loop and of the bare step."""
    data = noise(batch_size * steps, 32)
    params = TrainParams(
        epochs=rounds + 1,
        batch_size=batch_size,
        optimizer="sgd",
        learning_rate=1e-6,
        keep="last",
        checkpoint_seconds=1e9,
    )
    job = job_for(device, data, params, ModelParams(backbone="resnet50", doublings=(pixels // 32).bit_length() - 1))
    rows = np.arange(batch_size, dtype=np.int32)
    batch = rows if job.data_on_device else (data.images[rows], data.targets[rows])
    found: dict[str, Any] = {"pixels": pixels, "batch_size": batch_size}
    with tempfile.TemporaryDirectory() as folder:
        loop = SideBySide(job, params, Checkpoints(Path(folder), "speed"), batch)
        try:
            history = loop.run().rows
        except Exception as error:
            if not out_of_memory(error):
                raise
            return {**found, "out_of_memory": True}
    fit = float(np.median([batch_size * steps / row["seconds"] for row in history[1:]]))
    bare = float(np.median([batch_size / seconds for seconds in loop.bare[1:]]))
    found |= {"fit": round(fit), "bare_step": round(bare), "ratio": round(fit / bare, 3)}
    if loop.standing.micro_batches > 1:
        found["micro_batches"] = loop.standing.micro_batches
    say(f"{pixels} px, batch {batch_size}: {fit:,.0f} images/s, bare step {bare:,.0f}")
    return found


def from_scratch(options: argparse.Namespace, images_per_second: float) -> dict[str, Any]:
    """Train on CIFAR-10 for about ``--minutes`` and measure on its 10,000 test images."""
    from tasks.bundle import load_bundle, load_keras_model
    from tasks.data import load_split
    from tasks.download import DownloadParams, download
    from tasks.images import DecodePolicy
    from tasks.prepare import PrepareParams, prepare
    from tasks.train import train

    out = options.out
    download(out / "raw", DownloadParams(source="folder", path=str(options.source)), out / "partial")
    settings = PrepareParams(decode=DecodePolicy(size=32), normalization="standardize", validation_fraction=0.02)
    prepare(out / "raw", out / "additions", out / "prepared", out / "card.html", settings)
    (out / "augmented").mkdir(exist_ok=True)
    (out / "augmented" / "summary.json").write_text("{}")
    images = len(load_split(out / "prepared", "train").images)
    # Low resolution costs a quarter, so half of the epochs there cost an eighth.
    epochs = max(10, min(200, int(options.minutes * 60 * images_per_second / images / 0.625)))
    params = TrainParams(
        epochs=epochs,
        low_resolution_epochs=epochs // 2,
        batch_size=256,
        optimizer="sgd",
        learning_rate=0.2,
        weight_decay=0.005,
        warmup_epochs=2,
        label_smoothing=0.1,
        cutmix_alpha=1.0,
        ema_momentum=0.999,
        keep="last",
    )
    model = ModelParams(backbone="resnet50", doublings=2, batch_normalization_momentum=0.9)
    say(f"from scratch: {epochs} epochs")
    started = time.monotonic()
    train(out / "prepared", out / "augmented", out / "candidate", params, model, AUGMENT)
    seconds = time.monotonic() - started
    test = load_split(out / "prepared", "test")
    from tasks.learner import probabilities

    found = probabilities(load_keras_model(load_bundle(out / "candidate")), test.images, 256)
    accuracy = float((found.argmax(axis=1) == test.targets.argmax(axis=1)).mean())
    say(f"from scratch: {accuracy:.2%} on {len(found):,} test images after {seconds:.0f} s")
    history = pd.read_csv(out / "candidate" / "history.csv")
    reached = {
        f"{goal:.1%}": round(float(history.seconds.cumsum()[history.val_accuracy >= goal].iloc[0]), 1)
        for goal in (0.9, 0.94, ACCURACY_GOAL)
        if (history.val_accuracy >= goal).any()
    }
    return {
        "epochs": epochs,
        "seconds": round(seconds),
        "test_images": len(found),
        "test_accuracy": round(accuracy, 4),
        "training_seconds_to_validation_accuracy": reached,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return all parts' results."""
    device = prepare_device(require_gpu=not options.any_device)
    found: dict[str, Any] = {
        "device": device.name,
        "driver": device.driver,
        "backend": device.backend,
        "correctness": correctness(device),
        "speed_goal": SPEED_GOAL,
        "accuracy_goal": ACCURACY_GOAL,
    }
    sizes = [(pixels, batch_size) for pixels in options.pixels for batch_size in options.batch_sizes]
    found["speed"] = [speed(device, *size, options.steps, options.rounds) for size in sizes]
    if options.source:
        best = max((row.get("fit", 0) for row in found["speed"] if row["pixels"] == 128), default=1000)
        found["from_scratch"] = from_scratch(options, best)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="CIFAR-10 as class folders")
    parser.add_argument("--out", type=Path, default=Path("models/gpu"))
    parser.add_argument("--minutes", type=float, default=8.0, help="of training from scratch")
    parser.add_argument("--pixels", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[20, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--any-device", action="store_true", help="also without a GPU, to try this script")
    options = parser.parse_args()
    # What training prints on its way is not the result.
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(options)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    from tasks.errors import run_main

    run_main(main)
