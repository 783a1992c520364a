"""Write the fast inference engines beside the model, and prove that they agree with it."""

import argparse
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tasks.bundle import Bundle, Limits, load_bundle, load_keras_model
from tasks.calibration import apply_temperature, fit_temperature
from tasks.choice import available, compare, evidence, offered, this_machine
from tasks.data import load_split
from tasks.device import prepare_device
from tasks.engines import (
    OPENVINO_ENGINES,
    REFERENCE,
    Engine,
    import_openvino,
    open_engine,
    read_openvino,
    with_features,
    write_openvino,
)
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory
from tasks.params import read_section
from tasks.quantize import calibration_sample, quantize
from tasks.tally import Tally, image_statistics

#: Images that an engine's speed is measured on: a few seconds' worth for the slowest. The fastest run them repeatedly.
SPEED_IMAGES, SPEED_SECONDS = 256, 0.5
#: Chooses the training images that int8 finds its ranges on.
CALIBRATION_SEED = 0


class ExportParams(Limits):
    """What is written beside the Keras model, and how well it must agree.

    An OpenVINO engine beyond the limits on the validation split is written down but not offered; in float32 that fails
    the stage.

    Attributes:
        openvino: write OpenVINO engines, the fast way to classify on a CPU.
        int8: a quantized one, too; it costs ten to thirty seconds.
        accepted_precision: sets the bundle's confidence threshold: of the validation images at or above it, at least
            this share is right.
    """

    openvino: bool = True
    int8: bool = True
    accepted_precision: float = Field(0.99, ge=0, le=1)


@dataclass(frozen=True)
class ExportSummary:
    """Agreement with Keras float32 by engine, the temperature, and the threshold of confidence."""

    engines: dict[str, dict[str, Any]]
    temperature: float
    threshold: float


def confidence_threshold(probabilities: np.ndarray, targets: np.ndarray, precision: float) -> float:
    """Return the smallest confidence at which the accepted predictions are right often enough.

    Args:
        probabilities: float (N, C).
        targets: class indexes (N,).
        precision: the share of images at or above the threshold that must be right.

    Returns:
        A confidence in 0..1; 1.0 if no threshold reaches ``precision``.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == targets
    order = np.argsort(-confidence, kind="stable")
    share_right = np.cumsum(right[order]) / np.arange(1, len(right) + 1)
    # A threshold accepts all images of equal confidence, so only the last of each run of equals counts.
    last_of_equals = np.append(np.diff(confidence[order]) != 0, True)
    enough = np.flatnonzero((share_right >= precision) & last_of_equals)
    return float(confidence[order][enough[-1]]) if enough.size else 1.0


def images_per_second(engine: Engine, images: np.ndarray) -> float:
    """Return the speed of a warm engine on at most ``SPEED_IMAGES`` images in memory, the best of some runs."""
    sample = np.asarray(images[:SPEED_IMAGES])
    best, spent = math.inf, 0.0
    while spent < SPEED_SECONDS:
        started = time.perf_counter()
        engine.probabilities(sample)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
    return len(sample) / best


def export(candidate: Path, prepared: Path, out: Path, params: ExportParams) -> ExportSummary:
    """Copy the candidate's bundle, add the OpenVINO engines, and measure each engine on the validation split.

    Args:
        candidate: the train stage's output.
        prepared: the prepare stage's output.
        out: receives the completed bundle.

    Raises:
        NightlyError: OpenVINO in float32 does not agree with Keras.
    """
    prepare_device()
    training, validation = load_split(prepared, "train"), load_split(prepared, "validation")
    images, targets = validation.images, validation.targets.argmax(axis=1)
    with publish_directory(out) as partial:
        shutil.copytree(candidate, partial, dirs_exist_ok=True)
        limits = Limits(minimum_agreement=params.minimum_agreement, maximum_loss=params.maximum_loss)
        bundle = load_bundle(partial).changed(limits=limits, machine=this_machine())
        write_engines(bundle, training.images, params)
        keras_engine = open_engine(bundle, REFERENCE)
        raw, features = keras_engine.run(images)
        temperature = fit_temperature(raw, targets)
        reference = apply_temperature(raw, temperature)
        engines: dict[str, dict[str, Any]] = {}
        for name in [REFERENCE, *(name for name in OPENVINO_ENGINES if available(bundle, name))]:
            engine = keras_engine if name == REFERENCE else open_engine(bundle, name)
            found = (
                reference if engine is keras_engine else apply_temperature(engine.probabilities(images), temperature)
            )
            facts = compare(reference, found, targets, limits)
            facts["offered"] = facts.pop("passed")
            facts["images_per_second"] = round(images_per_second(engine, images), 1)
            engines[name] = facts
            bundle = bundle.changed(engines=engines)
            print(f"{name}: {evidence(bundle, name)}{'' if facts['offered'] else '; not offered'}", flush=True)
        _keep_what_agrees(bundle)
        threshold = confidence_threshold(reference, targets, params.accepted_precision)
        write_reference(bundle.reference_file, images, features, reference)
        bundle.changed(temperature=temperature, threshold=threshold).save()
    return ExportSummary(engines, temperature, threshold)


def write_engines(bundle: Bundle, training: np.ndarray, params: ExportParams) -> None:
    """Write the OpenVINO engines that ``params`` wants; int8's ranges come from uint8 images of the training split."""
    if not params.openvino:
        return
    write_openvino(with_features(load_keras_model(bundle)), bundle.openvino_file)
    if params.int8:
        started = time.monotonic()
        model = quantize(read_openvino(bundle.openvino_file), calibration_sample(training, CALIBRATION_SEED))
        file = bundle.engine_file("openvino-int8")
        file.parent.mkdir(parents=True)
        import_openvino().save_model(model, file, compress_to_fp16=False)
        print(f"quantized to int8 in {time.monotonic() - started:.1f} s", flush=True)


def _keep_what_agrees(bundle: Bundle) -> None:
    """Fail if OpenVINO in float32 is not offered, which is no matter of rounding; remove int8 if it is not."""
    name = "openvino-float32"
    if name in bundle.engines and not offered(bundle, name):
        raise NightlyError(
            f"{name} is too far from {REFERENCE}: {evidence(bundle, name)}, but export.minimum_agreement is "
            f"{bundle.limits.minimum_agreement:g} and export.maximum_loss {bundle.limits.maximum_loss:g}"
        )
    if not offered(bundle, "openvino-int8"):
        shutil.rmtree(bundle.engine_file("openvino-int8").parent, ignore_errors=True)


def write_reference(
    file: Path, images: np.ndarray, features: np.ndarray | None, probabilities: np.ndarray, block: int = 256
) -> None:
    """Write what later folders are compared with to see whether they drift: the validation split's statistics.

    Args:
        images: uint8 (N, H, W, 3).
        features: float32 (N, F) pooled features, if the model gives any.
        probabilities: float32 (N, C), after temperature scaling.
        block: rows that are added at once.
    """
    tally = Tally()
    for start in range(0, len(images), block):
        rows = slice(start, start + block)
        statistics = np.stack([image_statistics(pixels) for pixels in images[rows]])
        tally.add(statistics, None if features is None else features[rows], probabilities[rows])
    tally.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=export.__doc__.splitlines()[0])
    parser.add_argument("--candidate", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    summary = export(args.candidate, args.prepared, args.out, read_section(args.params, "export", ExportParams))
    names = ", ".join(name for name, facts in summary.engines.items() if facts["offered"])
    print(
        f"exported; engines offered: {names}; temperature {summary.temperature:g}; "
        f"predictions are accepted from confidence {summary.threshold:.3f}"
    )


if __name__ == "__main__":
    run_main(main)
