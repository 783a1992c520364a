"""Train the classifier on prepared arrays and leave a complete, inference-only model bundle behind."""

import argparse
import datetime
import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from tasks.augment import AugmentParams, build_augmentation
from tasks.bundle import FORMAT, MODEL_FILE, Bundle, model_id
from tasks.classifier import ModelParams, build_classifier
from tasks.device import Device, prepare_device
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory, read_json
from tasks.images import DecodePolicy
from tasks.params import Section, read_section
from tasks.progress import progress

LIBRARIES = ("keras", "tensorflow", "jax", "numpy", "opencv-python", "openvino", "resnet-nightly")


class TrainParams(Section):
    """How the classifier is trained.

    ``learning_rate`` is the peak; ``cosine`` lets it fall to zero after ``warmup_epochs`` of linear rise.
    ``keep`` says which epoch's weights become the model: the one of the lowest validation loss, or the last.
    ``precision`` is Keras's dtype policy in training; the saved model is float32 either way.
    ``jit_compile`` null means XLA on a GPU and none on a CPU, where it halved the speed.
    """

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: float = Field(0.0, ge=0)
    loss: Literal["categorical_crossentropy", "binary_crossentropy"] = "categorical_crossentropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    jit_compile: bool | None = None
    steps_per_execution: int = Field(1, ge=1)
    keep: Literal["best", "last"] = "best"
    early_stopping_epochs: int | None = Field(None, ge=1)
    seed: int = Field(1, ge=0, lt=2**31)
    require_gpu: bool = False

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be below epochs ({self.epochs})")
        if self.warmup_epochs and self.schedule == "constant":
            raise ValueError("warmup_epochs needs schedule: cosine")
        return self


@dataclass(frozen=True)
class TrainSummary:
    """The model's id, its accuracy on the validation split, and how long training took."""

    model_id: str
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Split:
    """A memory-mapped split: uint8 (N, H, W, 3) images, float32 (N, C) one-hot targets."""

    images: np.ndarray
    targets: np.ndarray


def load_split(prepared: Path, name: str) -> Split:
    """Map split ``name`` of the prepared data into memory."""
    folder = prepared / name
    if not (folder / "images.npy").is_file():
        raise NightlyError(f"{folder} has no images.npy: run the prepare stage first ('dvc repro prepare')")
    return Split(np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "targets.npy", mmap_mode="r"))


def make_batches(split: Split, batch_size: int, seed: int | None) -> Any:
    """Return a Keras ``PyDataset`` over a split.

    With a ``seed`` every epoch has its own order, a function of seed and epoch alone, and a short last batch is
    left out (its shape would be compiled a second time); without one the order stays and all images come.
    """
    import keras

    class Batches(keras.utils.PyDataset):
        def __init__(self) -> None:
            super().__init__()
            self.epoch = 0
            self.order = self._order()

        def _order(self) -> np.ndarray:
            if seed is None:
                return np.arange(len(split.images))
            return np.random.default_rng([seed, self.epoch]).permutation(len(split.images))

        def __len__(self) -> int:
            whole, rest = divmod(len(split.images), batch_size)
            return whole + (seed is None and rest > 0)

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            chosen = self.order[index * batch_size : (index + 1) * batch_size]
            return split.images[chosen], split.targets[chosen]

        def on_epoch_end(self) -> None:
            self.epoch += 1
            self.order = self._order()

    return Batches()


def make_optimizer(params: TrainParams, steps_per_epoch: int) -> Any:
    """Return the Keras optimizer with its learning-rate schedule."""
    import keras

    rate: Any = params.learning_rate
    if params.schedule == "cosine":
        warmup = round(params.warmup_epochs * steps_per_epoch)
        total = params.epochs * steps_per_epoch
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup else params.learning_rate,
            decay_steps=total - warmup,
            warmup_target=params.learning_rate if warmup else None,
            warmup_steps=warmup,
        )
    decay = params.weight_decay or None
    match params.optimizer:
        case "adam":
            return keras.optimizers.Adam(rate, weight_decay=decay)
        case "adamw":
            return keras.optimizers.AdamW(rate, weight_decay=params.weight_decay)
        case "rmsprop":
            return keras.optimizers.RMSprop(rate, weight_decay=decay)
        case "sgd":
            return keras.optimizers.SGD(
                rate, momentum=params.momentum, nesterov=params.momentum > 0, weight_decay=decay
            )


def make_loss(params: TrainParams) -> Any:
    """Return the Keras loss on probabilities."""
    import keras

    kinds = {
        "categorical_crossentropy": keras.losses.CategoricalCrossentropy,
        "binary_crossentropy": keras.losses.BinaryCrossentropy,
    }
    return kinds[params.loss](label_smoothing=params.label_smoothing)


def train(
    prepared: Path,
    augmented: Path,
    out: Path,
    params: TrainParams,
    model: ModelParams,
    augment: AugmentParams,
) -> TrainSummary:
    """Train the classifier and write its bundle.

    Args:
        prepared: the prepare stage's output.
        augmented: the augment stage's output; training waits for its checks to have passed.
        out: receives ``model.keras``, ``bundle.json`` and ``history.csv``.

    Raises:
        NightlyError: no GPU where one is required, fewer images than a batch, or a loss that is not finite.
    """
    if not (augmented / "summary.json").is_file():
        raise NightlyError(f"{augmented} has no summary.json: run the augment stage first ('dvc repro augment')")
    training, validation = load_split(prepared, "train"), load_split(prepared, "validation")
    if len(training.images) < params.batch_size:
        raise NightlyError(
            f"train.batch_size must be at most the {len(training.images)} training images, but is {params.batch_size}"
        )
    device = prepare_device(params.require_gpu)
    print(f"training on {device.name} ({device.backend}, {params.precision})", flush=True)

    import keras

    facts = read_json(prepared / "prepared.json")
    classes = read_json(prepared / "classes.json")
    size = training.images.shape[1]
    keras.utils.set_random_seed(params.seed)
    keras.config.set_dtype_policy(params.precision)
    try:
        classifier = build_classifier(model, size, len(classes), facts["normalization"])
        augmentation = build_augmentation(augment, training.images.shape[1:], params.seed)
        images = keras.Input(training.images.shape[1:], dtype="uint8")
        learner = keras.Model(images, classifier(augmentation(images)))
        steps = len(training.images) // params.batch_size
        learner.compile(
            optimizer=make_optimizer(params, steps),
            loss=make_loss(params),
            metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
            jit_compile=params.jit_compile if params.jit_compile is not None else device.kind == "gpu",
            steps_per_execution=params.steps_per_execution,
        )
        with progress("Training", params.epochs * steps, "steps") as advance:
            history = Recorder(advance, params, steps)
            started = time.monotonic()
            learner.fit(
                make_batches(training, params.batch_size, params.seed),
                validation_data=make_batches(validation, params.batch_size, None),
                epochs=params.epochs,
                shuffle=False,
                verbose=0,
                callbacks=history.callbacks(),
            )
            seconds = time.monotonic() - started
    finally:
        keras.config.set_dtype_policy("float32")
    table = pd.DataFrame(history.rows)
    kept = table.loc[table.val_loss.idxmin()] if params.keep == "best" else table.iloc[-1]
    final = _float32_copy(classifier, model, size, classes, facts["normalization"])
    with publish_directory(out) as partial:
        final.save(partial / MODEL_FILE)
        table.to_csv(partial / "history.csv", index=False)
        bundle = _bundle(partial, final, facts, classes, device, params, model, augment)
        bundle = bundle.changed(
            training={
                **bundle.training,
                "epochs": len(table),
                "kept_epoch": int(kept.epoch),
                "validation_accuracy": float(kept.val_accuracy),
                "seconds": round(seconds, 1),
                "images_per_second": round(len(table) * steps * params.batch_size / table.seconds.sum(), 1),
            }
        )
        bundle.save()
    return TrainSummary(bundle.id, float(kept.val_accuracy), seconds)


class Recorder:
    """Collects the history of a run, shows its progress, keeps the best weights, and stops a diverging one."""

    def __init__(self, advance: Any, params: TrainParams, steps_per_epoch: int) -> None:
        self.rows: list[dict[str, float]] = []
        self._advance = advance
        self._params = params
        self._steps = steps_per_epoch

    def callbacks(self) -> list[Any]:
        """Return the Keras callbacks, in the order in which they must run."""
        import keras

        recorder = self

        class Watch(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
                self.started = time.monotonic()
                self.shown = -1

            def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
                recorder._advance(batch - self.shown)
                self.shown = batch

            def on_test_begin(self, logs: dict | None = None) -> None:
                # Validation is not training: the epoch's speed counts training steps alone.
                self.seconds = time.monotonic() - self.started

            def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
                recorder._record(epoch + 1, self.seconds, float(self.model.optimizer.learning_rate), logs or {})

        callbacks: list[Any] = [Watch()]
        if self._params.keep == "best" or self._params.early_stopping_epochs:
            patience = self._params.early_stopping_epochs or self._params.epochs
            callbacks.append(
                keras.callbacks.EarlyStopping(
                    monitor="val_loss", patience=patience, restore_best_weights=self._params.keep == "best"
                )
            )
        return callbacks

    def _record(self, epoch: int, seconds: float, learning_rate: float, logs: dict[str, float]) -> None:
        if not all(np.isfinite(value) for value in logs.values()):
            last = f"after epoch {self.rows[-1]['epoch']}" if self.rows else "before any epoch ended"
            raise NightlyError(
                f"training diverged in epoch {epoch}, step {epoch * self._steps}: loss {logs['loss']}, validation loss "
                f"{logs['val_loss']} at learning rate {learning_rate:g}; the last finite figures were {last}. Lower "
                "train.learning_rate or raise train.warmup_epochs"
            )
        self.rows.append(
            {
                "epoch": epoch,
                **{key: round(logs[key], 6) for key in ("loss", "accuracy", "val_loss", "val_accuracy")},
                "learning_rate": learning_rate,
                "seconds": round(seconds, 2),
            }
        )
        speed = self._steps * self._params.batch_size / seconds
        print(
            f"epoch {epoch}/{self._params.epochs}: loss {logs['loss']:.4f}, accuracy {logs['accuracy']:.4f}, "
            f"validation loss {logs['val_loss']:.4f}, accuracy {logs['val_accuracy']:.4f}, "
            f"{seconds:.1f} s, {speed:.0f} images/s",
            flush=True,
        )


def _float32_copy(trained: Any, model: ModelParams, size: int, classes: list[str], normalization: dict) -> Any:
    """Return the same network in float32, without the training precision baked into its layers."""
    copy = build_classifier(model.changed(weights=None), size, len(classes), normalization)
    copy.set_weights(trained.get_weights())
    return copy


def _bundle(
    path: Path,
    final: Any,
    facts: dict[str, Any],
    classes: list[str],
    device: Device,
    params: TrainParams,
    model: ModelParams,
    augment: AugmentParams,
) -> Bundle:
    decode = DecodePolicy(**facts["decode"])
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Bundle(
        path=path,
        format=FORMAT,
        id=model_id(final.get_weights(), classes, decode, facts["normalization"]),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        classes=classes,
        decode=decode,
        normalization=facts["normalization"],
        parameters={
            section: value.model_dump(mode="json")
            for section, value in (("model", model), ("train", params), ("augment", augment))
        },
        data_digest=facts["data_digest"],
        test_digest=facts["test_digest"],
        libraries=versions,
        training={
            "backend": device.backend,
            "device": device.name,
            "precision": params.precision,
            "parameter_count": final.count_params(),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=train.__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--augmented", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    summary = train(
        args.prepared,
        args.augmented,
        args.out,
        read_section(args.params, "train", TrainParams),
        read_section(args.params, "model", ModelParams),
        read_section(args.params, "augment", AugmentParams),
    )
    print(
        f"trained model {summary.model_id}: validation accuracy {summary.validation_accuracy:.4f} in "
        f"{summary.seconds:.0f} s"
    )


if __name__ == "__main__":
    run_main(main)
