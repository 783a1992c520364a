"""Source images into split, resized, one-hot-labeled arrays that every later stage maps into memory."""

import argparse
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from natsort import natsort_keygen, natsorted
from pydantic import Field, model_validator

from tasks.data import npy_header
from tasks.datacard import render_data_card
from tasks.duplicates import mark_duplicates, near_duplicates
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory, read_json, write_json, write_text
from tasks.images import Decoded, DecodePolicy, Status, decode, encode_png, fit
from tasks.params import Section, read_section
from tasks.progress import progress
from tasks.sources import VERIFIED, Sample, read_archive, read_labels, read_samples

SPLITS = ("train", "validation", "test")
#: Means that keras.applications' ImageNet weights for ResNet50 expect to be subtracted, RGB, from "caffe" mode.
CAFFE_MEAN_RGB = (123.68, 116.779, 103.939)
#: Images decoded together; bounds the memory, whatever the size of the source.
CHUNK = 512
EXAMPLES_PER_CLASS = 4
MAXIMUM_EXAMPLES = 200


class PrepareParams(Section):
    """How source images become arrays, and what is too little or too broken to train on.

    The split is a function of each image's content, so adding images never moves an old one. A source's own test split
    stays as it is.

    Attributes:
        decode: how image files become pixels; it goes into the model's bundle, and prediction does the same.
        normalization: what the model's first layer does: ``unit`` is x/255; ``caffe`` is what keras.applications'
            ImageNet ResNet50 was trained on; ``standardize`` takes mean and standard deviation of the training split.
        validation_fraction: share of the images, by their hash, that training is watched and calibrated with.
        test_fraction: share that is the frozen test set, where the source brings none of its own; the two together must
            be below 1.
        minimum_images_per_class: for training; fewer stop the run.
        maximum_unreadable_fraction: share of damaged files; more stop the run.
        expected_classes: if given, exactly these must be found.
    """

    decode: DecodePolicy = DecodePolicy(size=32)
    normalization: Literal["unit", "caffe", "standardize"] = "standardize"
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    test_fraction: float = Field(0.2, gt=0, lt=1)
    minimum_images_per_class: int = Field(10, ge=1)
    maximum_unreadable_fraction: float = Field(0.02, ge=0, le=1)
    expected_classes: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _room_for_training(self) -> "PrepareParams":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1")
        return self


@dataclass(frozen=True)
class PrepareSummary:
    """Images per split, and images left out by reason."""

    counts: dict[str, int]
    left_out: dict[str, int]


def split_of(content_hash: str, source_split: str | None, source_has_test: bool, params: PrepareParams) -> str:
    """Return the split of an image from its SHA-256 alone, where its source does not fix it.

    Args:
        source_split: ``"test"`` or ``"train"`` as the source says, ``"addition"`` for images that came in
            later (they never enter the test split), or None.
        source_has_test: whether the source brings its own test split.
    """
    if source_split == "test":
        return "test"
    position = int(content_hash[:16], 16) / 2**64
    test_share = 0.0 if source_has_test else params.test_fraction
    if position < test_share:
        return "train" if source_split == "addition" else "test"
    return "validation" if position < test_share + params.validation_fraction else "train"


def leave_out_small_newcomers(manifest: pd.DataFrame, params: PrepareParams) -> pd.DataFrame:
    """Return the manifest with ``class_too_small`` for images of classes that only additions have, and too few of.

    The first few images of a new class would stop every run otherwise. Test images it has none, being all additions.
    """
    manifest = manifest.copy()
    for name in natsorted(set(manifest["class"]) - set(manifest["class"][manifest.origin == "source"])):
        good = manifest[(manifest["class"] == name) & (manifest.status == "ok")]
        train, validation = ((good.split == split).sum() for split in ("train", "validation"))
        if train < params.minimum_images_per_class or validation < 1:
            manifest.loc[good.index, "status"] = "class_too_small"
            manifest.loc[good.index, "reason"] = (
                f"class {name} is new and has {train} images for training and {validation} for validation so far, at "
                f"least {params.minimum_images_per_class} and 1 are needed"
            )
    return manifest


def class_names(manifest: pd.DataFrame) -> list[str]:
    """Return the classes of the source, and those that additions brought enough images of, in natural order."""
    return natsorted(set(manifest["class"][(manifest.origin == "source") | (manifest.status == "ok")]))


def one_hot(indices: np.ndarray, classes: int) -> np.ndarray:
    """Return float32 (N, classes) one-hot targets for int (N,) class indices."""
    return np.eye(classes, dtype=np.float32)[indices]


def normalization_of(mode: str, images: np.ndarray) -> dict[str, Any]:
    """Return what the model's first layer does to uint8 RGB: ``(x - mean) / std``, then the channel order.

    ``unit`` is x/255; ``caffe`` is what keras.applications' ImageNet ResNet50 was trained on (BGR, ImageNet's
    mean subtracted); ``standardize`` takes mean and standard deviation of ``images``, uint8 (N, H, W, 3).
    """
    if mode == "unit":
        return {"mode": mode, "mean": [0.0] * 3, "std": [255.0] * 3, "channel_order": "RGB"}
    if mode == "caffe":
        return {"mode": mode, "mean": list(CAFFE_MEAN_RGB), "std": [1.0] * 3, "channel_order": "BGR"}
    total = np.zeros(3)
    squares = np.zeros(3)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].astype(np.float64)
        total += chunk.sum(axis=(0, 1, 2))
        squares += np.square(chunk).sum(axis=(0, 1, 2))
    pixels = images.size / 3
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 0))
    std[std < 1e-6] = 1.0  # a channel without variation carries nothing; do not divide by zero
    return {
        "mode": mode,
        "mean": [round(float(value), 6) for value in mean],
        "std": [round(float(value), 6) for value in std],
        "channel_order": "RGB",
    }


def check_gates(manifest: pd.DataFrame, params: PrepareParams) -> None:
    """Stop before anything is trained on data that a broken pull or a wrong folder left behind.

    Raises:
        NightlyError: too many unreadable images, a class too small, or classes other than expected.
    """
    broken = manifest[~manifest.status.isin(["ok", "duplicate", "label_conflict", "class_too_small"])]
    if len(broken) > params.maximum_unreadable_fraction * len(manifest):
        example = broken.iloc[0]
        first = f"{example['name']} ({example.status}: {example.reason})"
        raise NightlyError(
            f"{len(broken)} of {len(manifest)} images are unreadable, prepare.maximum_unreadable_fraction allows "
            f"{params.maximum_unreadable_fraction:g} of them; the first is {first}"
        )
    good = manifest[manifest.status == "ok"]
    of_source = set(manifest["class"][manifest.origin == "source"])
    found = class_names(manifest)
    if params.expected_classes is not None and set(found) != set(params.expected_classes):
        missing = natsorted(set(params.expected_classes) - set(found))
        new = natsorted(set(found) - set(params.expected_classes))
        raise NightlyError(
            f"the classes differ from prepare.expected_classes: missing {missing or 'none'}, new {new or 'none'}"
        )
    if len(found) < 2:
        raise NightlyError(f"at least two classes are needed, found {len(found)}: {', '.join(found)}")
    counts = good.groupby(["class", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(index=found, columns=list(SPLITS), fill_value=0)
    for split, least in (("train", params.minimum_images_per_class), ("validation", 1), ("test", 1)):
        small = counts.index[counts[split] < least].tolist()
        if split == "test":
            small = [name for name in small if name in of_source]
        if small:
            named = ", ".join(f"{name} ({counts[split][name]})" for name in small[:10])
            raise NightlyError(
                f"too few images for the {split} split, at least {least} a class are needed: {named}; add images, or "
                "change prepare.minimum_images_per_class or the split's fraction"
            )


def prepare(raw: Path, additions: Path, out: Path, card: Path, params: PrepareParams) -> PrepareSummary:
    """Turn source images into split, resized, one-hot-labeled arrays.

    Args:
        raw: the download stage's output.
        additions: archives of labeled images that came in since; may be empty or absent. They enter the
            training and validation splits only.
        out: receives ``{train,validation,test}/images.npy`` (uint8 (N, size, size, 3) RGB) and ``targets.npy``
            (float32 (N, C) one-hot), ``classes.json``, ``normalization.json``, ``manifest.parquet`` (a row per
            source image; ``position`` is its row in its split's arrays, -1 if it was left out), ``prepared.json``
            and ``examples/``.
        card: receives the data card, a page of HTML; apart from ``out``, so that its looks retrain nothing.

    Raises:
        NightlyError: the source is damaged, or fails one of the gates (see ``check_gates``).
    """
    with publish_directory(out) as partial:
        scratch = partial / "pixels.bin"
        manifest = _decode_all(raw, additions, scratch, params.decode)
        if manifest.empty:
            raise NightlyError("the source holds no images: check download.source and what it points to")
        manifest = leave_out_small_newcomers(mark_duplicates(_assign(manifest, params)), params)
        check_gates(manifest, params)
        classes = class_names(manifest)
        size = params.decode.size
        pixels = np.memmap(scratch, np.uint8, "r").reshape(-1, size, size, 3)
        good = manifest[manifest.status == "ok"].sort_values("name", key=natsort_keygen(), kind="stable")
        counts = {}
        manifest["position"] = -1
        for split in SPLITS:
            chosen = good[good.split == split]
            _write_split(partial / split, pixels, chosen, classes)
            manifest.loc[chosen.index, "position"] = np.arange(len(chosen))
            counts[split] = len(chosen)
        normalization = normalization_of(params.normalization, np.load(partial / "train" / "images.npy", mmap_mode="r"))
        near = near_duplicates(pixels, good.row.to_numpy())
        write_json(partial / "classes.json", classes)
        write_json(partial / "normalization.json", normalization)
        manifest.drop(columns="row").to_parquet(partial / "manifest.parquet", index=False)
        left_out = dict(Counter(manifest.status[manifest.status != "ok"]))
        name_of_row = dict(zip(good.row, good.name, strict=True))
        split_of_row = dict(zip(good.row, good.split, strict=True))
        summary = {
            "source": read_json(raw / "source.json"),
            "decode": params.decode.model_dump(mode="json"),
            "normalization": normalization,
            "counts": counts,
            "left_out": left_out,
            "near_duplicates": {
                "pairs": len(near),
                "across_splits": sum(split_of_row[a] != split_of_row[b] for a, b in near),
                "first": [[name_of_row[a], name_of_row[b]] for a, b in near[:10]],
            },
            "test_digest": _digest(partial, ["test"], classes, normalization={}),
            "data_digest": _digest(partial, SPLITS, classes, normalization),
        }
        write_json(partial / "prepared.json", summary)
        samples = {
            name: [pixels[row] for row in good.row[(good["class"] == name) & (good.split == "train")][:10]]
            for name in classes
        }
        write_text(card, render_data_card(summary, manifest.drop(columns="row"), samples))
        _write_examples(partial / "examples", raw, good[good.split == "test"])
        del pixels
        scratch.unlink()
    return PrepareSummary(counts, left_out)


def _decode_all(raw: Path, additions: Path, scratch: Path, policy: DecodePolicy) -> pd.DataFrame:
    """Decode every image into ``scratch``, one after the other; return the manifest, its ``row`` counting them."""
    rows: list[dict[str, Any]] = []
    written = 0
    with scratch.open("wb") as file, progress("Decoding", None) as advance, ThreadPoolExecutor() as pool:
        for origin, samples in _origins(raw, additions):
            iterator = iter(samples)
            while chunk := list(itertools.islice(iterator, CHUNK)):
                for sample, decoded in zip(chunk, pool.map(lambda s: _decode(s, policy), chunk), strict=True):
                    rows.append(
                        {
                            "name": sample.name,
                            "origin": origin,
                            "content_hash": sample.content_hash,
                            "bytes": len(sample.data) if sample.data is not None else sample.pixels.nbytes,
                            "width": decoded.width,
                            "height": decoded.height,
                            "status": str(decoded.status),
                            "reason": decoded.reason,
                            "row": written if decoded.status == Status.OK else -1,
                        }
                    )
                    if decoded.status == Status.OK:
                        file.write(decoded.pixels.tobytes())
                        written += 1
                advance(len(chunk))
    return pd.DataFrame(rows)


def _origins(raw: Path, additions: Path) -> Iterator[tuple[str, Iterator[Sample]]]:
    yield "source", read_samples(raw)
    # Their limits were those of the decode policy, when they were packed.
    for archive in natsorted(additions.glob("[!.]*.tar")) if additions.is_dir() else []:
        yield archive.name, read_archive(archive, **VERIFIED)


def _decode(sample: Sample, policy: DecodePolicy) -> Decoded:
    if sample.data is not None:
        return decode(sample.data, policy)
    height, width = sample.pixels.shape[:2]
    return Decoded(Status.OK, "", fit(sample.pixels, policy), width, height)


def _assign(manifest: pd.DataFrame, params: PrepareParams) -> pd.DataFrame:
    """Add each image's class and split."""
    parts = []
    own_test = False
    for origin, group in manifest.groupby("origin", sort=False):  # the source comes first
        labels = read_labels(group.name)
        if origin == "source":
            own_test = any(label.split == "test" for label in labels.values())
        splits = []
        for name, content_hash in zip(group.name, group.content_hash, strict=True):
            given = labels[name].split if origin == "source" else "addition"
            splits.append(split_of(content_hash, given, own_test, params))
        parts.append(group.assign(**{"class": [labels[name].class_name for name in group.name]}, split=splits))
    return pd.concat(parts, ignore_index=True)


def _write_split(folder: Path, pixels: np.ndarray, chosen: pd.DataFrame, classes: list[str]) -> None:
    folder.mkdir()
    rows = chosen.row.to_numpy()
    with (folder / "images.npy").open("wb") as file:
        file.write(npy_header((len(rows), *pixels.shape[1:]), np.uint8))
        for start in range(0, len(rows), CHUNK):
            file.write(pixels[rows[start : start + CHUNK]].tobytes())
    index = {name: number for number, name in enumerate(classes)}
    np.save(folder / "targets.npy", one_hot(chosen["class"].map(index).to_numpy(int), len(classes)))


def _digest(folder: Path, splits: tuple[str, ...] | list[str], classes: list[str], normalization: dict) -> str:
    """Return the SHA-256 over pixels, targets and classes of some splits, in order."""
    digest = hashlib.sha256(repr((classes, sorted(normalization.items()))).encode())
    for split in splits:
        for name in ("images.npy", "targets.npy"):
            with (folder / split / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _write_examples(folder: Path, raw: Path, test: pd.DataFrame) -> None:
    """Copy a few of the test split's files as they came, for trying prediction on."""
    of_source = test[test.origin == "source"]
    chosen = set(of_source.groupby("class", sort=False).head(EXAMPLES_PER_CLASS).name[:MAXIMUM_EXAMPLES])
    class_of = dict(zip(of_source.name, of_source["class"], strict=True))
    for sample in read_samples(raw):
        if sample.name not in chosen:
            continue
        target = folder / class_of[sample.name] / Path(sample.name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        if sample.data is not None:
            target.write_bytes(sample.data)
        else:
            target.with_suffix(".png").write_bytes(encode_png(sample.pixels))
        chosen.remove(sample.name)
        if not chosen:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=prepare.__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--additions", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--card", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    params = read_section(args.params, "prepare", PrepareParams)
    summary = prepare(args.raw, args.additions, args.out, args.card, params)
    counts = ", ".join(f"{count:,} {split}" for split, count in summary.counts.items())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in summary.left_out.items())
    print(f"prepared {counts}" + (f"; left out {left_out}" if left_out else ""))


if __name__ == "__main__":
    run_main(main)
