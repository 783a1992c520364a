"""Train the classifier on prepared arrays and leave a complete, inference-only model bundle behind."""

import argparse
import contextlib
import datetime
import importlib.metadata
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tasks.augmentation import AugmentParams, build_augmentation
from tasks.bundle import FORMAT, MODEL_FILE, Bundle, load_bundle, load_keras_model, model_id
from tasks.checkpoint import Checkpoints, run_key
from tasks.classifier import ModelParams, build_classifier
from tasks.data import Split, load_split
from tasks.device import Device, data_parallel, keep_freed_memory, normalize_whole_batches, prepare_device
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory, read_json, sha256_file
from tasks.images import DecodePolicy
from tasks.loop import Job, Loop
from tasks.machine import Machine, choose, describe
from tasks.optimizers import make_loss, make_optimizer
from tasks.params import Section, read_section
from tasks.recipe import TrainParams
from tasks.registry import champion_id, champion_path
from tasks.standing import HISTORY_COLUMNS

LIBRARIES = ("keras", "tensorflow", "jax", "numpy", "opencv-python", "openvino", "resnet-nightly")
#: Parameters that change how a run is carried out, and not what comes out of it.
OPERATIONAL = {"require_gpu", "checkpoint_seconds", "data_on_device", "steps_per_execution"}


@dataclass(frozen=True)
class TrainSummary:
    """The model's id, its accuracy on the validation split, and how long training took."""

    model_id: str
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Scratch:
    """Directories that a run keeps things in from one attempt to the next; none of them is part of its result.

    ``champion`` is the bundle of the model in service, None if there is none.
    """

    checkpoints: Path
    features: Path
    champion: Path | None = None

    @classmethod
    def under(cls, directory: Path, models: Path | None = None) -> "Scratch":
        """Return places in ``directory``, and the model in service among ``models``."""
        in_service = models is not None and champion_id(models) is not None
        return cls(directory / "checkpoints", directory / "features", champion_path(models) if in_service else None)


@dataclass(frozen=True)
class Data:
    """The prepared data, as far as training needs it."""

    training: Split
    validation: Split
    classes: list[str]
    facts: dict[str, Any]

    @classmethod
    def load(cls, prepared: Path) -> "Data":
        splits = (load_split(prepared, name) for name in ("train", "validation"))
        return cls(*splits, read_json(prepared / "classes.json"), read_json(prepared / "prepared.json"))

    @property
    def size(self) -> int:
        return self.training.images.shape[1]


@dataclass
class Run:
    """One training: what it is made of, and how its recipe is carried out."""

    data: Data
    augmented: Path
    params: TrainParams
    model: ModelParams
    augment: AugmentParams
    device: Device
    machine: Machine
    scratch: Scratch
    #: What came up on the way, for the bundle.
    found: dict[str, Any] = field(default_factory=dict)

    def carry_out(self) -> tuple[list[dict[str, float]], dict[str, float], list[np.ndarray]]:
        """Return the history, the row of the epoch that is kept, and the classifier's weights."""
        start = self._weights_in_service() if self.params.warm_start else None
        if self.params.recipe == "finetune":
            return self._finetune(start)
        rows, kept, weights = self._probe(start)
        if self.params.recipe == "probe":
            return rows, kept, weights
        self.found["probe"] = {"epochs": len(rows), "validation_accuracy": kept["val_accuracy"]}
        return self._finetune(weights)

    def _finetune(self, start: list[np.ndarray] | None) -> tuple[list[dict], dict, list[np.ndarray]]:
        job = Job(
            self.data.training,
            self.data.validation,
            make_loss(self.params),
            lambda lower, parts: self.learner(start, lower, parts),
            self.machine.data_on_device,
            self.device.count,
        )
        self.checkpoints = Checkpoints(self.scratch.checkpoints, run_key(self._identity()))
        outcome = Loop(job, self.params, self.checkpoints).run()
        if outcome.micro_batches > 1:
            self.found["micro_batches"] = outcome.micro_batches
        return outcome.rows, outcome.kept, outcome.weights

    def _probe(self, start: list[np.ndarray] | None) -> tuple[list[dict], dict, list[np.ndarray]]:
        import keras

        from tasks.probe import probe

        keras.utils.set_random_seed(self.params.seed)
        classifier = self._classifier(self.model, frozen=True)
        if start is not None:
            classifier.set_weights(start)
        data = self.data
        outcome = probe(
            classifier,
            data.training,
            data.validation,
            self.augmented,
            self.scratch.features,
            self.params,
            self.model,
            trained_head=start is not None,
        )
        self.found["features"] = {
            "engine": outcome.engine,
            "images": outcome.images,
            "computed": outcome.computed,
            "seconds": {part: round(seconds, 1) for part, seconds in outcome.seconds.items()},
        }
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in outcome.seconds.items())
        print(
            f"probe by {outcome.engine}: {outcome.computed:,} of {outcome.images:,} images' features computed; {parts}"
        )
        return outcome.rows, outcome.kept, classifier.get_weights()

    def _classifier(self, model: ModelParams, *, frozen: bool = False) -> Any:
        return build_classifier(
            model,
            self.data.size,
            len(self.data.classes),
            self.data.facts["normalization"],
            frozen=frozen,
            freeze_batch_normalization=self.params.freeze_batch_normalization,
        )

    def learner(self, start: list[np.ndarray] | None, lower: int, parts: int) -> Any:
        """Return a compiled learner; always the same one for the same arguments."""
        import keras

        from tasks.learner import Learner
        from tasks.mixing import Mix

        params, shape = self.params, self.data.training.images.shape[1:]
        keras.utils.set_random_seed(params.seed)
        keras.config.set_dtype_policy(self.machine.precision)
        try:
            classifier = self._classifier(self.model.changed(doublings=self.model.doublings - lower))
            normalize_whole_batches(classifier, self.device)
            if start is not None:
                classifier.set_weights(start)
            augmentation = build_augmentation(self.augment, shape, params.seed)
            mix = None
            if params.mixup_alpha or params.cutmix_alpha:
                mix = Mix(params.mixup_alpha, params.cutmix_alpha, seed=params.seed)
            learner = Learner(
                classifier,
                augmentation,
                mix,
                make_loss(params),
                # A step in parts averages once for each of them.
                ema_momentum=params.ema_momentum and params.ema_momentum ** (1 / parts),
                resident=self.data.training if self.machine.data_on_device else None,
            )
            learner.compile(
                optimizer=make_optimizer(
                    params,
                    len(self.data.training.images) // params.batch_size,
                    head_variables=head_variables(classifier),
                    accumulation=parts,
                ),
                **self.machine.compile_options(),
            )
            classifier.compile(jit_compile=self.machine.jit_compile)
        finally:
            keras.config.set_dtype_policy("float32")
        return learner

    def _weights_in_service(self) -> list[np.ndarray] | None:
        """Return the champion's weights if its network is the one to be trained, and say what was decided."""
        champion = self.scratch.champion
        if champion is None:
            print("warm start: there is no model in service yet", flush=True)
            return None
        bundle = load_bundle(champion)
        wanted = self._classifier(self.model.changed(weights=None))
        weights = load_keras_model(bundle).get_weights()
        if bundle.classes != self.data.classes or [w.shape for w in weights] != [w.shape for w in wanted.weights]:
            print(f"warm start: model {bundle.id} has other classes or layers; starting without it", flush=True)
            return None
        print(f"warm start from model {bundle.id}", flush=True)
        self.found["warm_start"] = bundle.id
        return weights

    def _identity(self) -> dict[str, Any]:
        """Return all that a checkpoint must agree on."""
        weights = self.model.weights
        return {
            "train": self.params.model_dump(mode="json", exclude=OPERATIONAL),
            "model": self.model.model_dump(mode="json"),
            "augment": self.augment.model_dump(mode="json"),
            "weights": sha256_file(Path(weights)) if weights and Path(weights).is_file() else weights,
            "data": self.data.facts,
            "classes": self.data.classes,
            "device": [self.device.backend, self.device.kind, self.device.count, self.machine.precision],
            "libraries": library_versions(),
            "warm_start": self.found.get("warm_start"),
        }

    def tidy_up(self) -> None:
        """Remove the checkpoints of a run that is over."""
        if hasattr(self, "checkpoints"):
            self.checkpoints.clear()


def train(
    prepared: Path,
    augmented: Path,
    out: Path,
    params: TrainParams,
    model: ModelParams,
    augment: AugmentParams,
    scratch: Scratch | None = None,
) -> TrainSummary:
    """Train the classifier and write its bundle, going on from a checkpoint of the same run if there is one.

    Args:
        prepared: the prepare stage's output.
        augmented: the augment stage's output; training waits for its checks to have passed.
        out: receives ``model.keras``, ``bundle.json`` and ``history.csv``.
        scratch: what outlives an attempt; ``.scratch`` beside ``out`` if None.

    Raises:
        Interrupted: by a signal, after a checkpoint was written.
        NightlyError: no GPU where one is required, fewer images than a batch, or a loss that is not finite.
    """
    if not (augmented / "summary.json").is_file():
        raise NightlyError(f"{augmented} has no summary.json: run the augment stage first ('dvc repro augment')")
    data = Data.load(prepared)
    images = len(data.training.images)
    if images < params.batch_size:
        raise NightlyError(f"train.batch_size must be at most the {images} training images, but is {params.batch_size}")
    check_resolutions(params, model)
    device = prepare_device(params.require_gpu, deterministic=params.deterministic)
    if params.batch_size % device.count:
        raise NightlyError(
            f"train.batch_size must be a multiple of the {device.count} devices, but is {params.batch_size}"
        )
    if device.kind == "cpu":
        keep_freed_memory()
    machine = choose(params, device, data.training.images)
    print(f"training on {describe(device, machine, params)}", flush=True)
    scratch = scratch or Scratch.under(out.parent / ".scratch")
    run = Run(data, augmented, params, model, augment, device, machine, scratch)
    started = time.monotonic()
    with data_parallel(device):
        rows, kept, weights = run.carry_out()
    seconds = time.monotonic() - started
    table = pd.DataFrame(rows, columns=list(HISTORY_COLUMNS))
    # Built anew: the training precision is baked into the layers of the trained one.
    final = build_classifier(model.changed(weights=None), data.size, len(data.classes), data.facts["normalization"])
    final.set_weights(weights)
    training = {
        "recipe": params.recipe,
        "backend": device.backend,
        "device": device.name,
        "driver": device.driver,
        "devices": device.count,
        "precision": machine.precision,
        "parameter_count": final.count_params(),
        "training_images": images,
        "validation_images": len(data.validation.images),
        "epochs": len(table),
        "kept_epoch": int(kept["epoch"]),
        "validation_accuracy": float(kept["val_accuracy"]),
        "seconds": round(seconds, 1),
        "images_per_second": round(len(table) * (images - images % params.batch_size) / table.seconds.sum(), 1),
        **run.found,
    }
    with publish_directory(out) as partial:
        final.save(partial / MODEL_FILE)
        table.to_csv(partial / "history.csv", index=False)
        bundle = make_bundle(partial, final.get_weights(), data, training, model=model, train=params, augment=augment)
        bundle.save()
    run.tidy_up()
    return TrainSummary(bundle.id, float(kept["val_accuracy"]), seconds)


def check_resolutions(params: TrainParams, model: ModelParams) -> None:
    """Refuse ``low_resolution_epochs`` for a network whose weights do not fit the lower resolution."""
    if params.low_resolution_epochs and model.doublings < 1:
        raise NightlyError(
            f"train.low_resolution_epochs needs model.doublings of 1 or more, but it is {model.doublings}"
        )
    if params.low_resolution_epochs and model.pool != "avg":
        raise NightlyError(f"train.low_resolution_epochs needs model.pool: avg, but it is {model.pool}")


def head_variables(classifier: Any) -> list[Any]:
    """Return the variables of the layers after the pooling."""
    names = [layer.name for layer in classifier.layers]
    return [variable for layer in classifier.layers[names.index("pool") + 1 :] for variable in layer.variables]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a model depends on, as far as they are installed."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def make_bundle(
    path: Path, weights: list[np.ndarray], data: Data, training: dict[str, Any], **parameters: Section
) -> Bundle:
    """Return the facts of the model with these ``weights``."""
    decode, normalization = DecodePolicy(**data.facts["decode"]), data.facts["normalization"]
    return Bundle(
        path=path,
        format=FORMAT,
        id=model_id(weights, data.classes, decode, normalization),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        classes=data.classes,
        decode=decode,
        normalization=normalization,
        parameters={section: value.model_dump(mode="json") for section, value in parameters.items()},
        data_digest=data.facts["data_digest"],
        test_digest=data.facts["test_digest"],
        libraries=library_versions(),
        training=training,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=train.__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--augmented", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="checkpoints and cached features")
    parser.add_argument("--models", type=Path, required=True, help="where champion.json says what is in service")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    summary = train(
        args.prepared,
        args.augmented,
        args.out,
        read_section(args.params, "train", TrainParams),
        read_section(args.params, "model", ModelParams),
        read_section(args.params, "augment", AugmentParams),
        Scratch.under(args.scratch, args.models),
    )
    print(
        f"trained model {summary.model_id}: validation accuracy {summary.validation_accuracy:.4f} in "
        f"{summary.seconds:.0f} s"
    )


if __name__ == "__main__":
    run_main(main)
