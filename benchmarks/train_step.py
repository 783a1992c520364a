"""How much of the bare compiled step's speed training keeps, side by side in one run, as one JSON object.

``.venv/bin/python benchmarks/train_step.py [--backbone resnet50] [--doublings 0] [--batch-sizes 20 128] …``

- fit: the product's own loop (shuffling, augmentation, watching for divergence, progress), epoch by epoch;
- bare step: the same compiled step on one batch that stays on the device, measured after each of those epochs;
- notebook: the original code path in the same Keras: float images, x/255, UpSampling2D layers before ResNet50,
  Flatten, dense layers, RMSprop, ``model.fit`` on arrays with its defaults;
- pipeline: the batches alone, without a model.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tasks.augmentation import AugmentParams, EraserParams
from tasks.checkpoint import Checkpoints
from tasks.classifier import ModelParams
from tasks.data import Split
from tasks.device import keep_freed_memory, prepare_device
from tasks.loop import Job, Loop
from tasks.machine import choose, describe
from tasks.optimizers import make_loss
from tasks.recipe import TrainParams
from tasks.train import Data, Run, Scratch

CLASSES = 10
NORMALIZATION = {"mode": "unit", "mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0], "channel_order": "RGB"}
GOALS = {20: 0.90, 128: 0.97}


def noise(count: int, size: int) -> Split:
    """Return random images: no step of training depends on what is on them."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Split(images, np.eye(CLASSES, dtype=np.float32)[random.integers(0, CLASSES, count)])


def bare_step(learner: Any, batch: Any, steps: int) -> float:
    """Return the seconds of one compiled step on a batch that stays where it is."""
    import keras

    learner.make_train_function()
    step = learner.train_function
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        batches = iter(tf.data.Dataset.from_tensors((batch,)).repeat())
        started = time.perf_counter()
        for _ in range(steps):
            logs = step(batches)
        float(logs["loss"])
        return (time.perf_counter() - started) / steps
    import jax

    batches = itertools.repeat((jax.device_put(batch),))
    kinds = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
    state = learner._get_jax_state(**dict.fromkeys(kinds, True), purge_model_variables=True)
    started = time.perf_counter()
    for _ in range(steps):
        logs, state = step(state, batches)
    float(logs["loss"])
    seconds = (time.perf_counter() - started) / steps
    learner._jax_state = dict(zip(kinds, state, strict=True))
    learner.jax_state_sync()
    return seconds


class SideBySide(Loop):
    """The product's loop, with the bare step measured where it would validate."""

    def __init__(self, job: Job, params: TrainParams, checkpoints: Checkpoints, batch: Any) -> None:
        super().__init__(job, params, checkpoints)
        self.bare: list[float] = []
        self._batch = batch

    def _validate(self, learner: Any, used: list[np.ndarray]) -> tuple[float, float]:
        self.bare.append(bare_step(learner, self._batch, self.steps_per_epoch))
        return 0.0, 0.0


def measure(options: argparse.Namespace, batch_size: int, device: Any) -> dict[str, Any]:
    """Return the speeds at one batch size."""
    data = noise(batch_size * options.steps, options.size)
    params = TrainParams(
        epochs=options.rounds + 1,
        batch_size=batch_size,
        optimizer="sgd",
        learning_rate=1e-6,
        precision=options.precision,
        jit_compile=options.jit_compile,
        steps_per_execution=options.steps_per_execution,
        keep="last",
        checkpoint_seconds=1e9,
    )
    machine = choose(params, device, data.images)
    model = ModelParams(backbone=options.backbone, doublings=options.doublings)
    augment = AugmentParams(flip_horizontal=True, shift_pixels=4, eraser=EraserParams(p=0.5))
    run = Run(
        Data(data, data, [str(i) for i in range(CLASSES)], {"normalization": NORMALIZATION}),
        Path(),
        params,
        model,
        augment,
        device,
        machine,
        Scratch.under(Path()),
    )
    job = Job(
        data, data, make_loss(params), lambda lower, parts: run.learner(None, lower, parts), machine.data_on_device
    )
    rows = np.arange(batch_size, dtype=np.int32)
    batch = rows if machine.data_on_device else (data.images[rows], data.targets[rows])
    with tempfile.TemporaryDirectory() as folder:
        loop = SideBySide(job, params, Checkpoints(Path(folder), "bench"), batch)
        history = loop.run().rows
    # The first epoch compiles.
    fit = [batch_size * options.steps / row["seconds"] for row in history[1:]]
    bare = [batch_size / seconds for seconds in loop.bare[1:]]
    pipeline = pipeline_rate(data, batch_size, machine.data_on_device)
    ratio = statistics.median(one / other for one, other in zip(fit, bare, strict=True))
    return {
        "batch_size": batch_size,
        "how": describe(device, machine, params),
        "fit_images_per_second": round(statistics.median(fit), 1),
        "bare_step_images_per_second": round(statistics.median(bare), 1),
        "ratio": round(ratio, 3),
        "ratio_goal": GOALS.get(batch_size),
        "pipeline_images_per_second": round(pipeline),
        "pipeline_over_fit": round(pipeline / statistics.median(fit), 1),
        "pipeline_goal": 20,
    }


def pipeline_rate(data: Split, batch_size: int, rows_only: bool) -> float:
    """Return the images per second of the batches alone."""
    from tasks.learner import TrainingBatches

    batches = TrainingBatches(data, batch_size, 1, rows_only=rows_only)
    speeds = []
    for _ in range(5):
        started = time.perf_counter()
        for index in range(len(batches)):
            batches[index]
        batches.on_epoch_end()
        speeds.append(len(batches) * batch_size / (time.perf_counter() - started))
    return statistics.median(speeds)


def notebook(options: argparse.Namespace, batch_size: int) -> float:
    """Return the images per second of the notebook's code at the same resolution."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    pixels = options.size * 2**options.doublings
    model = keras.Sequential([keras.Input((options.size, options.size, 3))])
    for _ in range(options.doublings):
        model.add(layers.UpSampling2D((2, 2)))
    model.add(keras.applications.ResNet50(include_top=False, weights=None, input_shape=(pixels, pixels, 3)))
    model.add(layers.Flatten())
    for width in (128, 64):
        model.add(layers.BatchNormalization())
        model.add(layers.Dense(width, activation="relu"))
        model.add(layers.Dropout(0.5))
    model.add(layers.BatchNormalization())
    model.add(layers.Dense(CLASSES, activation="softmax"))
    model.compile(keras.optimizers.RMSprop(learning_rate=2e-5), "binary_crossentropy", metrics=["acc"])
    data = noise(batch_size * options.steps, options.size)
    images = data.images.astype("float32") / 255.0
    speeds = []
    for _ in range(options.rounds + 1):
        started = time.perf_counter()
        model.fit(images, data.targets, batch_size=batch_size, epochs=1, verbose=0)
        speeds.append(len(images) / (time.perf_counter() - started))
    return statistics.median(speeds[1:])


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Return the speeds at each batch size, and the notebook's."""
    device = prepare_device()
    if device.kind == "cpu":
        keep_freed_memory()  # as the train stage does; the notebook's part gains by it, too
    found: dict[str, Any] = {
        "device": device.name,
        "backend": device.backend,
        "cores": os.cpu_count(),
        "backbone": options.backbone,
        "pixels": options.size * 2**options.doublings,
        "sizes": [measure(options, batch_size, device) for batch_size in options.batch_sizes],
    }
    if options.notebook_batch_size:
        found["notebook_images_per_second"] = round(notebook(options, options.notebook_batch_size), 1)
        found["notebook_batch_size"] = options.notebook_batch_size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=32, help="pixels of the stored images")
    parser.add_argument("--doublings", type=int, default=0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[20, 128])
    parser.add_argument("--steps", type=int, default=30, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"])
    parser.add_argument("--jit-compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--steps-per-execution", type=int)
    parser.add_argument("--notebook-batch-size", type=int, default=20, help="0 leaves the notebook out")
    options = parser.parse_args()
    # What training prints on its way is not the result.
    with contextlib.redirect_stdout(sys.stderr):
        found = compare(options)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
