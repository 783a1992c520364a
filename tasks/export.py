"""Write the fast inference engines beside the model, and prove that they agree with it."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tasks.bundle import load_bundle, load_keras_model
from tasks.device import prepare_device
from tasks.engines import ENGINES, REFERENCE, Engine, import_openvino, open_engine, supports_bfloat16, with_features
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory
from tasks.metrics import agreement, max_difference
from tasks.params import Section, read_section

#: Images that an engine's speed is measured on: a few seconds' worth for the slowest.
SPEED_IMAGES = 256


class ExportParams(Section):
    """What is written beside the Keras model, and how well it must agree.

    ``minimum_agreement`` is the share of validation images to which an engine must give the same label as
    Keras in float32: OpenVINO in float32 must reach it or the stage fails; a faster precision that does not is
    written down but not offered. ``accepted_precision`` sets the bundle's confidence threshold: of the
    validation images at or above it, at least this share is right.
    """

    openvino: bool = True
    minimum_agreement: float = Field(0.995, ge=0, le=1)
    accepted_precision: float = Field(0.99, ge=0, le=1)


@dataclass(frozen=True)
class ExportSummary:
    """Agreement with Keras float32 by engine, and the threshold of confidence."""

    engines: dict[str, dict[str, Any]]
    threshold: float


def confidence_threshold(probabilities: np.ndarray, targets: np.ndarray, precision: float) -> float:
    """Return the smallest confidence at which the accepted predictions are right often enough.

    Args:
        probabilities: float (N, C).
        targets: (N, C) one-hot.
        precision: the share of images at or above the threshold that must be right.

    Returns:
        A confidence in 0..1; 1.0 if no threshold reaches ``precision``.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == targets.argmax(axis=1)
    order = np.argsort(-confidence, kind="stable")
    share_right = np.cumsum(right[order]) / np.arange(1, len(right) + 1)
    # A threshold accepts all images of equal confidence, so only the last of each run of equals counts.
    last_of_equals = np.append(np.diff(confidence[order]) != 0, True)
    enough = np.flatnonzero((share_right >= precision) & last_of_equals)
    return float(confidence[order][enough[-1]]) if enough.size else 1.0


def images_per_second(engine: Engine, images: np.ndarray) -> float:
    """Return the speed of a warm engine on at most ``SPEED_IMAGES`` images that are in memory."""
    sample = np.asarray(images[:SPEED_IMAGES])
    started = time.perf_counter()
    engine.probabilities(sample)
    return len(sample) / (time.perf_counter() - started)


def export(candidate: Path, prepared: Path, out: Path, params: ExportParams) -> ExportSummary:
    """Copy the candidate's bundle, add the OpenVINO engine, and measure each engine on the validation split.

    Args:
        candidate: the train stage's output.
        prepared: the prepare stage's output.
        out: receives the completed bundle.

    Raises:
        NightlyError: OpenVINO in float32 does not agree with Keras.
    """
    prepare_device()
    images = np.load(prepared / "validation" / "images.npy", mmap_mode="r")
    targets = np.load(prepared / "validation" / "targets.npy", mmap_mode="r")
    with publish_directory(out) as partial:
        shutil.copytree(candidate, partial, dirs_exist_ok=True)
        bundle = load_bundle(partial)
        if params.openvino:
            write_openvino(with_features(load_keras_model(bundle)), bundle.openvino_file)
        names = [name for name in ENGINES if name == REFERENCE or params.openvino]
        if not supports_bfloat16():
            names = [name for name in names if name != "openvino-bfloat16"]
        keras_engine = open_engine(bundle, REFERENCE)
        reference = keras_engine.probabilities(images)
        engines: dict[str, dict[str, Any]] = {}
        for name in names:
            engine = keras_engine if name == REFERENCE else open_engine(bundle, name)
            found = reference if name == REFERENCE else engine.probabilities(images)
            share = agreement(reference, found)
            speed = images_per_second(engine, images)
            engines[name] = {
                "agreement": share,
                "max_difference": max_difference(reference, found),
                "offered": share >= params.minimum_agreement,
                "images_per_second": round(speed, 1),
            }
            print(
                f"{name}: agreement {share:.4f} on {len(images):,} validation images, {speed:,.0f} images/s", flush=True
            )
            if name == "openvino-float32" and share < params.minimum_agreement:
                raise NightlyError(
                    f"{name} agrees with {REFERENCE} on {share:.4f} of the validation images, but "
                    f"export.minimum_agreement is {params.minimum_agreement:g}: the engine is not written"
                )
        threshold = confidence_threshold(reference, targets, params.accepted_precision)
        bundle.changed(engines=engines, threshold=threshold).save()
    return ExportSummary(engines, threshold)


def write_openvino(model: Any, destination: Path) -> None:
    """Convert a Keras model to OpenVINO's format: ``destination``, an ``.xml`` file, and a ``.bin`` beside it."""
    import_openvino()
    import keras

    destination.parent.mkdir(parents=True, exist_ok=True)
    if keras.backend.backend() in ("tensorflow", "openvino"):
        model.export(str(destination), format="openvino", verbose=False)
        return
    # From JAX Keras would go through TensorFlow, which need not be installed. Its OpenVINO backend needs neither,
    # but a process has one backend, chosen when Keras is imported.
    code = "import sys; from tasks.export import convert; convert(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "model.keras")
        model.save(saved)
        command = [sys.executable, "-W", "ignore", "-c", code, str(saved), str(destination)]
        environment = {**os.environ, "KERAS_BACKEND": "openvino"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NightlyError(f"{model.name} cannot be converted to OpenVINO: {reason}")


def convert(model_file: str, destination: str) -> None:
    """Convert a saved Keras model by the backend of this process."""
    import_openvino()
    import keras

    import tasks.layers  # noqa: F401  registers the layers that the file names

    write_openvino(keras.saving.load_model(model_file, compile=False, safe_mode=True), Path(destination))


def main() -> None:
    parser = argparse.ArgumentParser(description=export.__doc__.splitlines()[0])
    parser.add_argument("--candidate", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    summary = export(args.candidate, args.prepared, args.out, read_section(args.params, "export", ExportParams))
    offered = ", ".join(name for name, facts in summary.engines.items() if facts["offered"])
    print(f"exported; engines offered: {offered}; predictions are accepted from confidence {summary.threshold:.3f}")


if __name__ == "__main__":
    run_main(main)
