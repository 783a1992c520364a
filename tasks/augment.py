"""What training does to its images, drawn and measured before any time is spent on training."""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.augmentation import AugmentParams, build_augmentation
from tasks.data import Split, load_split, npy_header
from tasks.device import prepare_device
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory, publish_file, read_json, write_json
from tasks.params import read_section
from tasks.preview import describe, draw_preview
from tasks.progress import progress

#: Of the preview and the measurement; training draws with its own.
PREVIEW_SEED = 0
COPIES_SEED = 1
PREVIEW_CLASSES = 10
PREVIEW_DRAWS = 8
#: Images measured: at most so many, of at most so many pixels together.
SAMPLE_IMAGES, SAMPLE_PIXELS = 2048, 2**25
BATCH = 128


@dataclass(frozen=True)
class AugmentSummary:
    """Images measured, the share of them erased, the speed of the pipeline on this machine, and what was written."""

    images: int
    erased_fraction: float
    images_per_second: float
    copied_images: int
    copied_bytes: int


def apply(augmentation: Any, images: np.ndarray) -> np.ndarray:
    """Return uint8 ``images`` as training would see them this time, batch by batch."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(augmentation(batch, training=True)) for batch in batches])


def measure(params: AugmentParams, images: np.ndarray, augmented: np.ndarray) -> dict[str, Any]:
    """Return what the augmentation did to ``images``, and how often and how much the eraser alone erases.

    The eraser is measured with one seed on black and on white images of this shape: a fill cannot equal both,
    so every erased pixel shows in one of them, which photographs could not promise.
    """
    shape = images.shape[1:]
    alone = AugmentParams(shift_pixels=0, eraser=params.eraser)
    hit = np.zeros((len(images), *shape[:2]), bool)
    for canvas in (0, 255):
        blank = np.full(images.shape, canvas, np.uint8)
        hit |= (apply(build_augmentation(alone, shape, PREVIEW_SEED), blank) != canvas).any(axis=-1)
    share = hit.mean(axis=(1, 2))
    erased = share > 0
    return {
        "images": len(images),
        "image_shape": list(shape),
        "eraser": {
            "erased_fraction": round(float(erased.mean()), 6),
            "mean_erased_area": round(float(share[erased].mean()), 6) if erased.any() else 0.0,
        },
        "changed_fraction": round(float((images != augmented).any(axis=(1, 2, 3)).mean()), 6),
        "before": _channel_statistics(images),
        "after": _channel_statistics(augmented),
    }


def _channel_statistics(images: np.ndarray) -> dict[str, list[float]]:
    """Return mean and standard deviation of R, G, B in pixel values."""
    values = np.arange(256)
    statistics: dict[str, list[float]] = {"mean": [], "std": []}
    for channel in range(images.shape[-1]):
        # From the histogram: exact, the same on every machine, and without a float copy of the images.
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean = float(share @ values)
        statistics["mean"].append(round(mean, 4))
        statistics["std"].append(round(float(np.sqrt(share @ (values - mean) ** 2)), 4))
    return statistics


def images_per_second(augmentation: Any, images: np.ndarray, seconds: float = 0.5) -> float:
    """Return the uncompiled speed of the augmentation; inside a compiled training step it is faster."""
    batch = images[:BATCH]
    np.asarray(augmentation(batch, training=True))
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        np.asarray(augmentation(batch, training=True))
        done += len(batch)
    return done / (time.perf_counter() - start)


def augment(prepared: Path, out: Path, preview: Path, params: AugmentParams) -> AugmentSummary:
    """Build the augmentation, draw what training will see, and measure it on a sample.

    Args:
        prepared: the prepare stage's output.
        out: receives ``summary.json`` and the copies, the same bytes for the same input and backend. Training
            depends on them: a timing in there would retrain every night, so it is returned instead.
        preview: receives the picture, a PNG; apart from ``out``, so that its looks retrain nothing.

    Raises:
        NightlyError: the parameters do not suit the images' size.
    """
    split = load_split(prepared, "train")
    images, labels = split.images, split.targets.argmax(axis=1)
    classes = read_json(prepared / "classes.json")
    if not len(images):
        raise NightlyError(f"{prepared / 'train'} holds no images to augment")
    shape = tuple(images.shape[1:])
    # Evenly spaced over the split, which a source may have sorted by class.
    count = min(SAMPLE_IMAGES, len(images), max(1, SAMPLE_PIXELS // (shape[0] * shape[1])))
    chosen = np.unique(np.linspace(0, len(images) - 1, count).astype(int))
    sample = images[chosen]
    augmentation = build_augmentation(params, shape, PREVIEW_SEED)
    summary = measure(params, sample, apply(augmentation, sample))

    present = [index for index in range(len(classes)) if (labels == index).any()]
    shown = [present[i] for i in np.unique(np.linspace(0, len(present) - 1, PREVIEW_CLASSES).astype(int))]
    firsts = np.stack([images[np.argmax(labels == index)] for index in shown])
    draws = np.split(apply(augmentation, firsts.repeat(PREVIEW_DRAWS, axis=0)), len(shown))
    rows = [(classes[index], firsts[i], draws[i]) for i, index in enumerate(shown)]
    some = f", {len(shown)} of {len(classes)} classes" if len(shown) < len(classes) else ""
    with publish_directory(out) as partial:
        summary["copies"] = write_copies(params, split, partial)
        write_json(partial / "summary.json", summary)
        with publish_file(preview) as picture:
            draw_preview(picture, rows, f"Augmentation{some}", describe(params))
    speed = images_per_second(augmentation, sample)
    copies = summary["copies"]
    return AugmentSummary(len(sample), summary["eraser"]["erased_fraction"], speed, copies["images"], copies["bytes"])


def write_copies(params: AugmentParams, split: Split, out: Path, seed: int = COPIES_SEED) -> dict[str, int]:
    """Write ``params.copies`` augmented copies of a split: copy k of its N images' image i is row k * N + i.

    Args:
        out: receives ``images.npy`` and ``targets.npy``, or neither if no copies are asked for.

    Returns:
        How many ``images`` were written, and their ``bytes``.
    """
    images, targets = split.images, split.targets
    written = {"images": params.copies * len(images), "bytes": params.copies * images.nbytes}
    if not params.copies:
        return written
    augmentation = build_augmentation(params, images.shape[1:], seed)
    with (
        (out / "images.npy").open("wb") as image_file,
        (out / "targets.npy").open("wb") as target_file,
        progress("Augmented copies", written["images"]) as advance,
    ):
        for file, rows in ((image_file, images), (target_file, targets)):
            file.write(npy_header((params.copies * len(rows), *rows.shape[1:]), rows.dtype))
        for _ in range(params.copies):
            for start in range(0, len(images), BATCH):
                batch = images[start : start + BATCH]
                image_file.write(np.asarray(augmentation(batch, training=True)).tobytes())
                target_file.write(targets[start : start + BATCH].tobytes())
                advance(len(batch))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=augment.__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preview", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    params = read_section(args.params, "augment", AugmentParams)
    # A picture and a few sums: starting a GPU would take longer, and its memory may be in use.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    prepare_device()
    summary = augment(args.prepared, args.out, args.preview, params)
    if summary.copied_images:
        size = f"{summary.copied_images:,} images, {summary.copied_bytes:,} bytes"
        print(f"{params.copies} augmented copies of the training split: {size} in {args.out / 'images.npy'}")
    print(
        f"{describe(params)}; measured on {summary.images:,} images: {summary.erased_fraction:.1%} erased, "
        f"{summary.images_per_second:,.0f} images/s uncompiled; see {args.preview}"
    )


if __name__ == "__main__":
    run_main(main)
