"""The depth study: which trainings it consists of, by what recipe, and which of them are done already."""

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tasks.augmentation import AugmentParams
from tasks.errors import NightlyError
from tasks.files import read_json
from tasks.params import Section
from tasks.recipe import TrainParams
from tasks.resnet import NETWORKS

#: Bottleneck networks are no part of the comparison; the VGG networks are those of keras.applications.
VGG = ("vgg16", "vgg19")
STUDIED = (*(name for name, network in NETWORKS.items() if not network.bottleneck), *VGG)
#: The modules that decide what numbers come out of a training.
CODE = ("augmentation", "classifier", "layers", "learner", "loop", "metrics", "optimizers", "resnet", "study_run")
#: Parameters of training that say how it is carried out, and not what comes out of it.
_OPERATIONAL = {"precision", "require_gpu", "checkpoint_seconds"}
#: Networks of so many layers do not start to converge at the full learning rate (He et al. 2015, section 4.2).
_WARMED_UP_DEPTH = 100


class StudyParams(Section):
    """What ``nightly study`` compares, by the recipe of He et al. 2015 (arXiv 1512.03385), section 4.2.

    Training has the augmentation of section ``augment``. The learning rate is divided by ten at half and at three
    quarters of the iterations.

    Attributes:
        networks: of tasks.resnet, without the bottlenecks, and ``vgg16`` and ``vgg19``.
        seeds: each network is trained once with every one of them.
        iterations: steps of training, the same for all networks.
        evaluate_every: iterations between two points of a curve; the training images are shuffled anew after each.
        batch_size: images per iteration.
        learning_rate: its peak.
        vgg_learning_rate: that of the VGG networks, which have no BatchNormalization and diverge at the others'.
        warmup_iterations: of a tenth of the rate, for networks of 100 layers and more; at most a tenth of the run.
        momentum: of stochastic gradient descent, without Nesterov's look-ahead.
        weight_decay: L2, as the paper counts it; of kernels only.
        doublings: upsampling of the images for the networks of 18 and 34 layers, as ``model.doublings``.
        batch_normalization_momentum: as ``model.batch_normalization_momentum``.
        curve_test_images: test images, evenly spread, behind each point of a curve; null: all. The last figure is
            always that of all.
        final_train_images: training images, evenly spread and without augmentation, behind the final training error.
        parallel: trainings at a time; on a CPU each gets its share of the cores, which is faster than one on all. On a
            GPU they would only wait for each other.
        precision: Keras's dtype policy; null: chosen for the device.
        require_gpu: fail in seconds rather than train on the CPU for weeks.
        checkpoint_seconds: between two checkpoints.
        time_limit_hours: of one training; one that takes longer goes on with the next ``nightly study``.
    """

    networks: tuple[str, ...] = Field(("plain20", "plain56", "resnet20", "resnet56"), min_length=1)
    seeds: tuple[int, ...] = Field((1, 2), min_length=1)
    iterations: int = Field(64_000, ge=4)
    evaluate_every: int = Field(320, ge=1)
    batch_size: int = Field(128, ge=1)
    learning_rate: float = Field(0.1, gt=0)
    vgg_learning_rate: float = Field(0.01, gt=0)
    warmup_iterations: int = Field(400, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    doublings: int = Field(2, ge=0, le=6)
    batch_normalization_momentum: float = Field(0.9, gt=0, lt=1)
    curve_test_images: int | None = Field(None, ge=1)
    final_train_images: int = Field(10_000, ge=1)
    parallel: int = Field(1, ge=1)
    precision: Literal["float32", "mixed_bfloat16"] | None = None
    require_gpu: bool = False
    checkpoint_seconds: float = Field(60.0, ge=0)
    time_limit_hours: float = Field(24.0, gt=0)

    @field_validator("networks")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not set(names) <= set(STUDIED):
            raise ValueError(f"must be among {', '.join(STUDIED)}")
        return _once(names)

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= seed < 2**31 for seed in seeds):
            raise ValueError("seeds must be 0 or more and below 2**31")
        return _once(seeds)

    @model_validator(mode="after")
    def _whole_intervals(self) -> "StudyParams":
        if self.iterations % self.evaluate_every:
            raise ValueError(f"iterations must be a multiple of evaluate_every ({self.evaluate_every})")
        return self

    @property
    def points(self) -> int:
        """How many points a curve has."""
        return self.iterations // self.evaluate_every


def _once(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("must all be different")
    return values


@dataclass(frozen=True)
class Trial:
    """One training of the study; ``digest`` stands for all that its numbers depend on."""

    network: str
    seed: int
    digest: str

    @property
    def file_name(self) -> str:
        return f"{self.network}-seed{self.seed}-{self.digest}.json"


def depth(network: str) -> int:
    """Return the number of weighted layers in a network's name."""
    return int(network.lstrip("abcdefghijklmnopqrstuvwxyz"))


def family(network: str) -> str:
    """Return which networks of other depths one is compared with."""
    if network in VGG:
        return "VGG"
    kind = "ResNet" if NETWORKS[network].residual else "plain"
    return kind if NETWORKS[network].cifar else f"{kind}, upsampled"


def doublings(network: str, params: StudyParams) -> int:
    """Return how often the images are doubled for a network: not at all for those made for small ones."""
    return 0 if network in VGG or NETWORKS[network].cifar else params.doublings


def recipe(network: str, seed: int, params: StudyParams) -> TrainParams:
    """Return how a network is trained; an epoch of it is the interval between two points of a curve."""
    warmup = min(params.warmup_iterations, params.iterations // 10) if depth(network) >= _WARMED_UP_DEPTH else 0
    return TrainParams(
        epochs=params.points,
        batch_size=params.batch_size,
        optimizer="sgd",
        learning_rate=params.vgg_learning_rate if network in VGG else params.learning_rate,
        momentum=params.momentum,
        nesterov=False,
        # From L2 in the loss to a decay beside it, see TrainParams.
        weight_decay=params.weight_decay / (1 - params.momentum),
        schedule="steps",
        warmup_epochs=warmup / params.evaluate_every,
        keep="last",
        seed=seed,
        precision=params.precision,
        require_gpu=params.require_gpu,
        checkpoint_seconds=params.checkpoint_seconds,
    )


def l2_weight_decay(train: Mapping[str, Any]) -> float:
    """Return the weight decay that section ``study`` has for a recipe with these values."""
    return train["weight_decay"] * (1 - train["momentum"])


def trials(prepared: Path, params: StudyParams, augment: AugmentParams) -> list[Trial]:
    """Return all trainings of the study on the prepared data, seed by seed, the most expensive networks first."""
    facts = prepared / "prepared.json"
    if not facts.is_file():
        raise NightlyError(f"{prepared} has no prepared.json: run the prepare stage first ('dvc repro prepare')")
    data, code = read_json(facts)["data_digest"], code_version()
    networks = sorted(params.networks, key=depth, reverse=True)
    return [
        Trial(network, seed, _digest(identity(network, seed, params, augment) | {"data": data, "code": code}))
        for seed in params.seeds
        for network in networks
    ]


def identity(network: str, seed: int, params: StudyParams, augment: AugmentParams) -> dict[str, Any]:
    """Return all parameters that the numbers of one training depend on."""
    shared = ("evaluate_every", "batch_normalization_momentum", "curve_test_images", "final_train_images")
    return {
        "network": network,
        "train": recipe(network, seed, params).model_dump(mode="json", exclude=_OPERATIONAL),
        "augment": augment.model_dump(mode="json"),
        "doublings": doublings(network, params),
        **{name: getattr(params, name) for name in shared},
    }


def code_version() -> str:
    """Return a digest of what the modules in ``CODE`` do, whatever their comments, docstrings and layout."""
    trees = [ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")) for name in CODE]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return _digest([ast.dump(tree) for tree in trees])


def result(results: Path, trial: Trial) -> dict[str, Any] | None:
    """Return what came of a training, None if it is still to be done."""
    path = results / trial.file_name
    return read_json(path) if path.is_file() else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]
