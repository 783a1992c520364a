"""How long a probe takes on this machine, part by part, as one JSON object.

``.venv/bin/python benchmarks/probe.py --source DIRECTORY_OR_TAR [--images 50000] [--precision int8] …``

The source holds images in one folder per class. Without one, JPEGs of noise are made: the time hardly depends on
what is on an image, nor on the backbone's weights, which are random unless ``--weights`` names some.

- read: the files, out of a tar or a directory, into memory;
- decode: JPEG to pixels as the prepare stage does it;
- model: TensorFlow's or JAX's import, and building the network;
- build: converting the backbone to the fastest engine, quantizing it if so asked, compiling it;
- features: of all images, the tenth of them included that is held out for validation;
- head: training it to the end.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tasks.classifier import ModelParams, build_classifier
from tasks.data import Split
from tasks.device import prepare_device
from tasks.errors import NightlyError, describe
from tasks.images import DecodePolicy, decode
from tasks.prepare import normalization_of, one_hot
from tasks.probe import probe
from tasks.recipe import TrainParams
from tasks.sources import read_archive, read_labels

VALIDATION_SHARE = 0.1
GENERATED_IMAGES, GENERATED_CLASSES = 2000, 10


def read_files(source: Path) -> list[tuple[str, bytes]]:
    """Return the name, as in <class>/<image>, and the bytes of every image file."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        return [(path.relative_to(source).as_posix(), path.read_bytes()) for path in files]
    return [(sample.name, sample.data) for sample in read_archive(source)]


def generate(count: int, size: int) -> list[tuple[str, bytes]]:
    """Return noise as JPEG files of alternating classes."""
    import io

    from PIL import Image

    random, files = np.random.default_rng(0), []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "JPEG")
        files.append((f"class{number % GENERATED_CLASSES}/{number:06d}.jpg", buffer.getvalue()))
    return files


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Put the seconds that the block takes into ``seconds``."""
    began = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - began


def measure(options: argparse.Namespace) -> dict:
    """Run the probe and return what it took."""
    seconds: dict[str, float] = {}
    files = [] if options.source else generate(options.images or GENERATED_IMAGES, options.size)
    began = time.perf_counter()
    if options.source:
        with timed(seconds, "read"):
            files = read_files(options.source)
    if options.images and options.images > len(files):
        raise NightlyError(f"--images must be at most the source's {len(files):,}, but is {options.images:,}")
    order = np.random.default_rng(0).permutation(len(files))[: options.images]
    chosen = [files[index] for index in order]
    labels = read_labels([name for name, _ in chosen])
    classes = sorted({label.class_name for label in labels.values()})
    policy = DecodePolicy(size=options.size)
    with timed(seconds, "decode"), ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda file: decode(file[1], policy), chosen))
        refused = [
            (name, found.reason) for (name, _), found in zip(chosen, decoded, strict=True) if found.pixels is None
        ]
        if refused:
            raise NightlyError(f"{len(refused)} files cannot be read, the first is {refused[0]}")
        images = np.stack([found.pixels for found in decoded])
    targets = one_hot(np.array([classes.index(labels[name].class_name) for name, _ in chosen]), len(classes))
    held_out = round(VALIDATION_SHARE * len(images))
    validation, training = Split(images[:held_out], targets[:held_out]), Split(images[held_out:], targets[held_out:])
    model = ModelParams(backbone=options.backbone, weights=options.weights, doublings=options.doublings)
    params = TrainParams(recipe="probe", probe={"precision": options.precision, "epochs": options.epochs})
    with timed(seconds, "model"):
        device = prepare_device()
        import keras

        keras.utils.set_random_seed(params.seed)
        normalization = normalization_of("unit", training.images)
        classifier = build_classifier(model, options.size, len(classes), normalization, frozen=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        outcome = probe(classifier, training, validation, Path(folder, "no copies"), cache, params, model)
    total = time.perf_counter() - began
    seconds |= outcome.seconds
    size = options.size * 2**options.doublings
    return {
        "images": len(images),
        "pixels": size,
        "backbone": options.backbone,
        "weights": options.weights or "random",
        "engine": outcome.engine,
        "epochs": len(outcome.rows),
        "validation_accuracy": outcome.kept["val_accuracy"],
        "seconds": {part: round(value, 1) for part, value in seconds.items()} | {"all_in": round(total, 1)},
        "features_per_second": round(outcome.computed / max(seconds["features"], 1e-9), 1),
        "images_per_second_all_in": round(len(images) / total, 1),
        "device": device.name,
        "backend": device.backend,
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="directory or tar of <class>/<image>; generated images without it")
    parser.add_argument("--images", type=int, help="a random choice of so many; all without it")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16", "int8"], default="auto")
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--size", type=int, default=32, help="pixels of the decoded images")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--weights", help="imagenet or a weights file")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--cache", type=Path, help="keeps the features; a temporary directory without it")
    options = parser.parse_args()
    # What training prints on its way is not the result.
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(options)
    except NightlyError as error:
        sys.exit(f"error: {describe(error)}")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
