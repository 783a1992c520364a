"""A folder of JPEGs to a table, beside the engine's own limit and other ways to do it, as one JSON object.

``.venv/bin/python benchmarks/predict_folder.py [--source DIRECTORY_OR_TAR] [--images 2000] [--precision int8] …``

Two folders are made: small JPEGs as they are in the source (noise of 32 px without one), and JPEGs of 500×400 px,
mosaics of them. The model is ResNet50 with random weights, which change no time, on images enlarged to 256 px. In each
round come, one after the other:

- limit: the same engine on images that are decoded and in memory already;
- ours: ``tasks.predict.predict``, files to tables; its rate is counted from the first image on, ``all_in`` from the
  command's beginning;

and once each, on fewer images, since they are slower:

- loop: ``cv2.imread``, resize and ``model.predict`` of one image at a time, as the notebook had it;
- keras: ``image_dataset_from_directory`` and ``model.predict``;
- torch: bfloat16, channels-last, compiled, DataLoader; only where torch and torchvision are installed;
- ray: Ray Data's ``read_images`` and ``map_batches`` with the Keras model, the start of its workers included, which
  come one after the other with so few images; only where ray is installed.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import numpy as np

from tasks.bundle import FORMAT, Bundle, load_bundle, load_keras_model, model_id
from tasks.classifier import ModelParams, build_classifier
from tasks.engines import open_engine
from tasks.export import ExportParams, export
from tasks.images import DecodePolicy, decode
from tasks.predict import PredictParams, predict
from tasks.prepare import normalization_of
from tasks.sources import read_archive

CLASSES = [f"class{number}" for number in range(10)]
LARGE = (500, 400)
GOALS = {"32": 0.95, "500x400": 0.90, "over_loop": 20, "over_keras": 10, "over_torch": 2}


def small_files(source: Path | None, count: int) -> list[bytes]:
    """Return the bytes of ``count`` JPEGs of 32 px."""
    if source is None:
        random = np.random.default_rng(0)
        return [encode(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(count)]
    if source.is_dir():
        found = [path.read_bytes() for path in sorted(source.rglob("*.jp*g"))[:count]]
    else:
        found = [sample.data for _, sample in zip(range(count), read_archive(source), strict=False)]
    return [found[number % len(found)] for number in range(count)]


def encode(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def mosaic(tiles: list[np.ndarray], random: np.random.Generator) -> bytes:
    """Return a JPEG of 500×400 px: small images enlarged to 100 px, side by side."""
    width, height = LARGE
    chosen = random.integers(0, len(tiles), (height // 100, width // 100))
    rows = [np.concatenate([cv2.resize(tiles[number], (100, 100)) for number in row], axis=1) for row in chosen]
    return encode(np.concatenate(rows))


def make_folder(folder: Path, files: list[bytes]) -> Path:
    """Write the files into a folder for each class, as Keras wants them."""
    for number, data in enumerate(files):
        path = folder / CLASSES[number % len(CLASSES)] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_bundle(folder: Path, images: np.ndarray, size: int, doublings: int, backbone: str) -> Bundle:
    """Return an exported bundle with random weights in which every engine may be asked for."""
    params = ModelParams(backbone=backbone, doublings=doublings)
    normalization = normalization_of("unit", images)
    model = build_classifier(params, size, len(CLASSES), normalization)
    policy = DecodePolicy(size=size)
    candidate, prepared = folder / "candidate", folder / "prepared"
    candidate.mkdir(parents=True)
    model.save(candidate / "model.keras")
    facts = {
        "format": FORMAT,
        "id": model_id(model.get_weights(), CLASSES, policy, normalization),
        "created": "",
        "classes": CLASSES,
        "decode": policy,
        "normalization": normalization,
        "parameters": {},
        "data_digest": "",
        "test_digest": "",
        "libraries": {},
        "training": {},
    }
    Bundle(path=candidate, **facts).save()
    targets = np.eye(len(CLASSES), dtype=np.float32)[np.arange(len(images)) % len(CLASSES)]
    for split in ("train", "validation", "test"):
        (prepared / split).mkdir(parents=True)
        np.save(prepared / split / "images.npy", images)
        np.save(prepared / split / "targets.npy", targets)
    export(candidate, prepared, folder / "exported", ExportParams(minimum_agreement=0.0, maximum_loss=1.0))
    bundle = load_bundle(folder / "exported")
    # Random weights answer by a hair's breadth, so what int8 agrees with says nothing; the time is the same.
    engines = {name: {**evidence, "offered": True} for name, evidence in bundle.engines.items()}
    bundle.changed(engines=engines, path=bundle.path).save()
    return load_bundle(folder / "exported")


def notebook_loop(model: Any, files: list[Path], size: int) -> float:
    """Return images/s of reading, resizing and predicting one image at a time."""
    began = None
    for number, path in enumerate(files):
        image = cv2.resize(cv2.imread(str(path)), (size, size))  # noqa: TID251  it is what is compared with
        model.predict(image[np.newaxis], verbose=0)
        if number == 0:
            began = time.perf_counter()  # the first one compiles
    assert began is not None
    return (len(files) - 1) / (time.perf_counter() - began)


def keras_folder(model: Any, folder: Path, images: int, size: int) -> float:
    """Return images/s of Keras's own way to read a folder and predict on it, after a batch that compiles."""
    import keras

    data = keras.utils.image_dataset_from_directory(
        folder, image_size=(size, size), batch_size=32, shuffle=False, verbose=False
    )
    batches = data.map(lambda pixels, _: _as_uint8(pixels))
    model.predict(batches.take(1), verbose=0)
    began = time.perf_counter()
    rows = len(model.predict(batches.take(images // 32), verbose=0))
    return rows / (time.perf_counter() - began)


def _as_uint8(pixels: Any) -> Any:
    import tensorflow as tf

    return tf.cast(pixels, tf.uint8)


def torch_folder(folder: Path, images: int, size: int) -> float:
    """Return images/s of torchvision's ResNet50 in bfloat16, channels-last, compiled, with a DataLoader."""
    import torch
    import torchvision

    steps = torchvision.transforms.Compose(
        [torchvision.transforms.Resize((size, size)), torchvision.transforms.ToTensor()]
    )
    data = torchvision.datasets.ImageFolder(folder, steps)
    subset = torch.utils.data.Subset(data, range(min(images, len(data))))
    loader = torch.utils.data.DataLoader(subset, batch_size=32, num_workers=os.cpu_count() or 1)
    model = torchvision.models.resnet50().eval().to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(next(iter(loader))[0].to(memory_format=torch.channels_last))
        began, rows = time.perf_counter(), 0
        for batch, _ in loader:
            rows += len(compiled(batch.to(memory_format=torch.channels_last)))
    return rows / (time.perf_counter() - began)


def ray_folder(bundle: Bundle, folder: Path, images: int, size: int) -> float:
    """Return images/s of Ray Data reading the folder and an actor predicting with Keras, their start included."""
    import ray

    location = bundle.path

    class Predictor:
        def __init__(self) -> None:
            self.model = load_keras_model(load_bundle(location))

        def __call__(self, batch: dict) -> dict:
            return {"probabilities": self.model.predict(np.asarray(batch["image"], np.uint8), verbose=0)}

    ray.init("local", num_cpus=os.cpu_count(), include_dashboard=False, logging_level="ERROR", configure_logging=False)
    try:
        files = [str(path) for path in sorted(folder.rglob("*.jpg"))[:images]]
        data = ray.data.read_images(files, size=(size, size), mode="RGB")
        began, rows = time.perf_counter(), 0
        for batch in data.map_batches(Predictor, batch_size=32, concurrency=1).iter_batches(batch_size=None):
            rows += len(batch["probabilities"])
        return rows / (time.perf_counter() - began)
    finally:
        ray.shutdown()


def side_by_side(bundle: Bundle, folder: Path, work: Path, precision: str, rounds: int) -> dict[str, Any]:
    """Return our rate on a folder and the engine's on the same images in memory, round by round."""
    files = sorted(path for path in folder.rglob("*.jpg"))
    pixels = np.stack([decode(path.read_bytes(), bundle.decode).pixels for path in files])
    params = PredictParams(engine="openvino", precision=precision)
    engine = open_engine(bundle, f"openvino-{precision}")
    engine.probabilities(pixels[: engine.batch_size])
    limits, rates, all_in, first = [], [], [], []
    for number in range(rounds):
        began = time.perf_counter()
        engine.probabilities(pixels)
        limits.append(len(pixels) / (time.perf_counter() - began))
        summary = predict(folder, work / f"out-{folder.name}-{number}", bundle.path, params)
        assert summary.counts.statuses["ok"] == len(files)
        first.append(summary.first_image_seconds)
        rates.append((len(files) - 1) / (summary.seconds - summary.first_image_seconds))
        all_in.append(len(files) / summary.seconds)
    limit, ours = statistics.median(limits), statistics.median(rates)
    return {
        "files": len(files),
        "limit": round(limit, 1),
        "ours": round(ours, 1),
        "ratio": round(statistics.median(ours / limit for ours, limit in zip(rates, limits, strict=True)), 3),
        "all_in": round(statistics.median(all_in), 1),
        "first_image_seconds": round(statistics.median(first), 2),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return everything measured."""
    random = np.random.default_rng(0)
    data = small_files(options.source, options.images)
    tiles = [cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR) for file in data[:500]]
    size = options.size
    found: dict[str, Any] = {
        "model": f"{options.backbone} at {size * 2**options.doublings} px, random weights",
        "precision": options.precision,
        "goals": GOALS,
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folders = {
            "32": make_folder(work / "32", data),
            "500x400": make_folder(work / "500x400", [mosaic(tiles, random) for _ in range(options.images)]),
        }
        policy = DecodePolicy(size=size)
        images = np.stack([decode(file, policy).pixels for file in data[:300]])
        bundle = make_bundle(work / "model", images, size, options.doublings, options.backbone)
        found["export"] = {key: value["images_per_second"] for key, value in bundle.engines.items()}
        for kind, folder in folders.items():
            found[kind] = side_by_side(bundle, folder, work, options.precision, options.rounds)
        folder, few = folders["32"], min(options.others, options.images)
        model = load_keras_model(bundle)
        others: dict[str, Callable[[], float]] = {
            "loop": lambda: notebook_loop(model, sorted(folder.rglob("*.jpg"))[: max(2, few // 4)], size),
            "keras": lambda: keras_folder(model, folder, few, size),
        }
        if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
            others["torch"] = lambda: torch_folder(folder, few, size * 2**options.doublings)
        if importlib.util.find_spec("ray"):
            others["ray"] = lambda: ray_folder(bundle, folder, few, size)
        for other, run in others.items():
            rate = run()
            found[other] = {"images_per_second": round(rate, 1), "ours_over_it": round(found["32"]["ours"] / rate, 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="directory or archive of JPEGs of 32 px")
    parser.add_argument("--images", type=int, default=2000, help="in each folder")
    parser.add_argument("--others", type=int, default=192, help="images for the slower ways")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "bfloat16", "int8"], default="int8")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--doublings", type=int, default=3)
    options = parser.parse_args()
    # What is printed on the way is not the result.
    with contextlib.redirect_stdout(sys.stderr):
        found = measure(options)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    from tasks.errors import run_main

    run_main(main)
