"""What training does to its images, drawn and measured before any time is spent on training."""

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import cv2
import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from tasks.device import prepare_device
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory, read_json, write_json
from tasks.params import Section, read_section
from tasks.progress import progress

#: Of the preview and the measurement; training draws with its own.
PREVIEW_SEED = 0
COPIES_SEED = 1
PREVIEW_CLASSES = 10
PREVIEW_DRAWS = 8
#: Images are enlarged by whole factors to at least the first and shrunk to at most the second, in pixels.
PREVIEW_TILE = (64, 112)
#: Images measured: at most so many, of at most so many pixels together.
SAMPLE_IMAGES, SAMPLE_PIXELS = 2048, 2**25
BATCH = 128


class EraserParams(Section):
    """The random eraser (Zhong et al. 2017, arXiv 1708.04896), by the names of the notebook's function.

    Attributes:
        p: share of the images that are erased; 0 turns it off.
        s_l: smallest share of the image's area.
        s_h: largest share of it.
        r_1: smallest height / width of the rectangle.
        r_2: largest height / width.
        v_l: smallest gray that it is filled with, a pixel value.
        v_h: largest one.
        pixel_level: fill it with noise instead, each pixel and channel with a value of its own.
    """

    p: float = Field(0.25, ge=0, le=1)
    s_l: float = Field(0.02, gt=0, le=1)
    s_h: float = Field(0.4, gt=0, le=1, validate_default=True)
    r_1: float = Field(0.3, gt=0)
    r_2: float = Field(1 / 0.3, gt=0, validate_default=True)
    v_l: float = Field(0, ge=0, le=255)
    v_h: float = Field(255, ge=0, le=255, validate_default=True)
    pixel_level: bool = False

    @field_validator("s_h", "r_2", "v_h")
    @classmethod
    def _in_order(cls, value: float, info: ValidationInfo) -> float:
        lower = {"s_h": "s_l", "r_2": "r_1", "v_h": "v_l"}[info.field_name or ""]
        # A lower bound that is wrong itself is missing here, and reported on its own.
        if value < info.data.get(lower, value):
            raise ValueError(f"must be at least {lower} ({info.data[lower]:g})")
        return value


class AugmentParams(Section):
    """What happens to training images, in this order; a class must survive it (a mirrored digit is none).

    Attributes:
        flip_horizontal: mirror half of the images left to right.
        flip_vertical: turn half of them upside down.
        shift_pixels: shifts are uniform in minus to plus so many pixels on both axes.
        shift_fill: what comes in over the edge: its last pixel repeated (``edge``), the mirrored image (``reflect``:
            good for photographs, but it brings bits of a digit's strokes back in), or black (``constant``).
        eraser: a rectangle of each chosen image is filled.
        copies: augmented copies of the training split, written for training on cached features, which a frozen backbone
            computes once; each costs as much disk as the split, and as much computing of features.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    shift_pixels: int = Field(1, ge=0)
    shift_fill: Literal["edge", "reflect", "constant"] = "edge"
    eraser: EraserParams = EraserParams()
    copies: int = Field(0, ge=0)


@dataclass(frozen=True)
class AugmentSummary:
    """Images measured, the share of them erased, the speed of the pipeline on this machine, and what was written."""

    images: int
    erased_fraction: float
    images_per_second: float
    copied_images: int
    copied_bytes: int


def build_augmentation(params: AugmentParams, image_shape: tuple[int, int, int], seed: int) -> Any:
    """Return the augmentation as a Keras model, uint8 ``(N, H, W, 3)`` in and out, active in training only.

    Each layer draws from a stream of its own, derived from ``seed``; Keras's global random state is not used.

    Raises:
        NightlyError: a shift as large as the image, or an eraser whose rectangles never fit into it.
    """
    import keras

    from tasks.layers import RandomErasing, RandomFlip, RandomShift

    smallest = min(image_shape[:2])
    if params.shift_pixels >= smallest:
        raise NightlyError(
            f"augment.shift_pixels must be below the image's {smallest} pixels, but is {params.shift_pixels}"
        )
    seeds = [int(state) for state in np.random.SeedSequence(seed).generate_state(3, np.uint32) >> 1]
    stages: list[Any] = []
    if params.flip_horizontal or params.flip_vertical:
        stages.append(RandomFlip(params.flip_horizontal, params.flip_vertical, seed=seeds[0]))
    if params.shift_pixels:
        stages.append(RandomShift(params.shift_pixels, params.shift_fill, seed=seeds[1]))
    if params.eraser.p:
        stages.append(RandomErasing(**params.eraser.model_dump(), seed=seeds[2], name="eraser"))
    stages = stages or [keras.layers.Identity()]
    try:
        return keras.Sequential([keras.Input(image_shape, dtype="uint8"), *stages], name="augmentation")
    except ValueError as error:
        raise NightlyError(f"augment.eraser: {error}") from None


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


def describe(params: AugmentParams) -> str:
    """Return the augmentation in words, for the preview's subtitle."""
    words = []
    if params.flip_horizontal or params.flip_vertical:
        ways = {"horizontal": params.flip_horizontal, "vertical": params.flip_vertical}
        words.append("flip " + " and ".join(way for way, used in ways.items() if used))
    if params.shift_pixels:
        fill = {"edge": "repeated", "reflect": "mirrored", "constant": "black"}[params.shift_fill]
        words.append(f"shift up to {params.shift_pixels} px, {fill} edge")
    if params.eraser.p:
        eraser, kind = params.eraser, "noise" if params.eraser.pixel_level else "gray"
        area = f"{eraser.s_l:.0%} to {eraser.s_h:.0%} of the area"
        words.append(f"erase {eraser.p:.0%} of the images, {area}, {kind}")
    return "  ·  ".join(words) or "no augmentation: training sees the images as they are"


def draw_preview(path: Path, rows: list[tuple[str, np.ndarray, np.ndarray]], title: str, subtitle: str) -> None:
    """Write a PNG sheet with one row per class: the name, the original, then the draws.

    Args:
        rows: class name, original uint8 (H, W, 3), draws uint8 (D, H, W, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gap, apart, margin, header = 6, 26, 24, 92
    tiles = [[_tile(image) for image in (original, *draws)] for _, original, draws in rows]
    height, width = tiles[0][0].shape[:2]
    names = [_shortened(name) for name, _, _ in rows]
    left = margin + 12 + max(24, max(int(8.2 * len(name)) for name in names))
    columns = [left] + [left + width + apart + i * (width + gap) for i in range(len(tiles[0]) - 1)]
    size = (max(columns[-1] + width + margin, 640), header + len(rows) * (height + gap) - gap + margin)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    sheet = np.full((size[1], size[0], 3), 255, np.uint8)
    ink, soft = "#1d2733", "#6b7785"

    def write(x: float, y: float, text: str, points: float, color: str, **style: Any) -> None:
        # Class names are people's own words: a dollar sign starts no formula.
        figure.text(x / size[0], 1 - y / size[1], text, size=points, color=color, parse_math=False, **style)

    for index, (name, row) in enumerate(zip(names, tiles, strict=True)):
        top = header + index * (height + gap)
        for column, tile in zip(columns, row, strict=True):
            sheet[top : top + height, column : column + width] = tile
        write(left - 12, top + height / 2, name, 9.5, ink, ha="right", va="center_baseline")
    figure.figimage(sheet, origin="upper", resize=False)
    write(margin, 32, title, 13, ink, weight="bold", va="baseline")
    write(margin, 53, subtitle, 9, soft, va="baseline")
    write(columns[0], header - 9, "original", 8, soft, va="baseline")
    write(columns[1], header - 9, "as training sees it", 8, soft, va="baseline")
    with warnings.catch_warnings():
        # A class named in a script that the font lacks is drawn as boxes; that is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # No date and no version: the same pixels give the same file.
        canvas.print_png(path, metadata={"Software": None})


def _tile(image: np.ndarray) -> np.ndarray:
    """Enlarge by a whole factor, so that every pixel stays a square; shrink what is larger than a tile."""
    least, most = PREVIEW_TILE
    longest = max(image.shape[:2])
    if longest > most:
        height, width = (max(1, round(edge * most / longest)) for edge in image.shape[:2])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    factor = -(-least // longest)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def augment(prepared: Path, out: Path, params: AugmentParams) -> AugmentSummary:
    """Build the augmentation, draw what training will see, and measure it on a sample.

    Args:
        prepared: the prepare stage's output.
        out: receives ``preview.png``, ``summary.json`` and the copies, the same bytes for the same input and backend.
            Training depends on them: a timing in there would retrain every night, so it is returned instead.

    Raises:
        NightlyError: the parameters do not suit the images' size.
    """
    images = np.load(prepared / "train" / "images.npy", mmap_mode="r")
    labels = np.load(prepared / "train" / "targets.npy", mmap_mode="r").argmax(axis=1)
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
        draw_preview(partial / "preview.png", rows, f"Augmentation{some}", describe(params))
        summary["copies"] = write_copies(params, prepared / "train", partial)
        write_json(partial / "summary.json", summary)
    speed = images_per_second(augmentation, sample)
    copies = summary["copies"]
    return AugmentSummary(len(sample), summary["eraser"]["erased_fraction"], speed, copies["images"], copies["bytes"])


def write_copies(params: AugmentParams, split: Path, out: Path, seed: int = COPIES_SEED) -> dict[str, int]:
    """Write ``params.copies`` augmented copies of a split: copy k of its N images' image i is row k * N + i.

    Args:
        split: holds ``images.npy`` and ``targets.npy``.
        out: receives files of the same names, or none if no copies are asked for.

    Returns:
        How many ``images`` were written, and their ``bytes``.
    """
    images = np.load(split / "images.npy", mmap_mode="r")
    targets = np.load(split / "targets.npy", mmap_mode="r")
    written = {"images": params.copies * len(images), "bytes": params.copies * images.nbytes}
    if not params.copies:
        return written
    augmentation = build_augmentation(params, images.shape[1:], seed)
    with (
        _array_file(out / "images.npy", images, params.copies) as image_file,
        _array_file(out / "targets.npy", targets, params.copies) as target_file,
        progress("Augmented copies", written["images"]) as advance,
    ):
        for _ in range(params.copies):
            for start in range(0, len(images), BATCH):
                batch = images[start : start + BATCH]
                image_file.write(np.asarray(augmentation(batch, training=True)).tobytes())
                target_file.write(targets[start : start + BATCH].tobytes())
                advance(len(batch))
    return written


@contextmanager
def _array_file(path: Path, like: np.ndarray, copies: int) -> Iterator[BinaryIO]:
    """Open an ``.npy`` file whose rows are to be written one after the other, ``copies`` times those of ``like``.

    Written, not mapped into memory: where a full disk stops a write with an error, it kills a mapping's owner.
    """
    with path.open("wb") as file:
        shape = (copies * len(like), *like.shape[1:])
        header = {"descr": np.lib.format.dtype_to_descr(like.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def main() -> None:
    parser = argparse.ArgumentParser(description=augment.__doc__.splitlines()[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    params = read_section(args.params, "augment", AugmentParams)
    # A picture and a few sums: starting a GPU would take longer, and its memory may be in use.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    prepare_device()
    summary = augment(args.prepared, args.out, params)
    if summary.copied_images:
        size = f"{summary.copied_images:,} images, {summary.copied_bytes:,} bytes"
        print(f"{params.copies} augmented copies of the training split: {size} in {args.out / 'images.npy'}")
    print(
        f"{describe(params)}; measured on {summary.images:,} images: {summary.erased_fraction:.1%} erased, "
        f"{summary.images_per_second:,.0f} images/s uncompiled; see {args.out / 'preview.png'}"
    )


if __name__ == "__main__":
    run_main(main)
