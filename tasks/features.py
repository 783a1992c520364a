"""Pooled features of a frozen backbone: computed once by the machine's fastest engine, then read from a cache.

A cache holds one directory per array of images and way of computing: ``<digest>/features.npy`` and ``facts.json``.
While it is being computed it is called ``.<digest>.unfinished``, and what is in it is gone on with after a kill.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data import npy_header
from tasks.device import prepare_device
from tasks.engines import (
    CPU_BATCH,
    Engine,
    KerasEngine,
    OpenVINOEngine,
    read_openvino,
    supports_bfloat16,
    write_openvino,
)
from tasks.errors import Interrupted, NightlyError
from tasks.files import read_json, write_json
from tasks.progress import progress
from tasks.quantize import calibration_sample, quantize
from tasks.signals import stop_requests

#: Counts up when the same key would stand for other numbers.
FORMAT = 1
#: What was not used for longest goes when a new entry would make the cache larger; what the present run uses stays.
CACHE_BYTES = 4 * 2**30
#: Rows between two points that a killed computation goes on from: about ten seconds' worth on two cores.
FLUSH_ROWS = 1024
GPU_BATCH = 128
#: Bytes of images hashed at once.
BLOCK_BYTES = 1 << 24


class FeatureSource:
    """Features by one extractor: out of the cache, or computed and put there.

    Args:
        extractor: a Keras model from uint8 (N, H, W, 3) images to float32 (N, F) features, F fixed.
        cache: the cache's directory; made if there is none.
        identity: JSON values for what the extractor is besides its weights: network, resolution, normalization.
        precision: ``float32``, ``bfloat16``, ``int8`` or ``auto``; see ``tasks.recipe.ProbeParams``.
        calibration: uint8 (M, H, W, 3) images of the training split, for ``int8``.
        seed: chooses the calibration images.

    Attributes:
        precision: the one that is really used.
        engine: what computes, for people.
        seconds: spent on getting the engine ready (``build``) and on computing (``features``).
        computed: images whose features did not come from the cache.
    """

    def __init__(
        self,
        extractor: Any,
        cache: Path,
        *,
        identity: dict[str, Any],
        precision: str = "auto",
        calibration: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self._extractor = extractor
        self._cache = cache
        self._gpu = prepare_device().kind == "gpu"
        self.precision = choose_precision(precision, self._gpu)
        self._sample: np.ndarray | None = None
        if self.precision == "int8":
            if calibration is None or not len(calibration):
                raise NightlyError("train.probe.precision int8 needs training images to calibrate with")
            self._sample = calibration_sample(calibration, seed)
        self.engine, versions = self._engine_facts()
        self._key = {
            "format": FORMAT,
            "identity": identity,
            "weights": _digest(extractor.get_weights()),
            "image_shape": list(extractor.input_shape[1:]),
            "features": extractor.output_shape[1],
            "precision": self.precision,
            "engine": versions,
            "calibration": _digest([self._sample]) if self._sample is not None else None,
        }
        self._opened: Engine | None = None
        self._used: set[Path] = set()
        self.seconds = {"build": 0.0, "features": 0.0}
        self.computed = 0

    def features(self, images: np.ndarray, name: str) -> np.ndarray:
        """Return the float32 (N, F) features of uint8 (N, H, W, 3) ``images``, memory-mapped; ``name`` is for people.

        Raises:
            NightlyError: there is not enough room on the disk, or a feature is not finite.
            Interrupted: by SIGTERM or SIGINT; what was computed is kept.
        """
        key = {**self._key, "images": _digest([images])}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        entry, unfinished = self._cache / digest, self._cache / f".{digest}.unfinished"
        self._used |= {entry, unfinished}
        shape = (len(images), int(self._key["features"]))
        found = _open_entry(entry, shape)
        if found is not None:
            (entry / "facts.json").touch()  # the time of its last use
            print(f"features of {name}: {shape[0]:,} images from the cache", flush=True)
            return found
        rows = self._start(unfinished, shape)
        engine = self._engine()
        began = time.monotonic()
        self._compute(engine, images, unfinished, rows, name)
        seconds = time.monotonic() - began
        self.seconds["features"] += seconds
        self.computed += shape[0] - rows
        speed = (shape[0] - rows) / max(seconds, 1e-9)
        write_json(unfinished / "facts.json", {**key, "images_per_second": round(speed, 1)})
        shutil.rmtree(entry, ignore_errors=True)
        unfinished.rename(entry)
        (entry / "progress.json").unlink(missing_ok=True)
        print(f"features of {name}: {shape[0] - rows:,} images by {self.engine}, {speed:,.0f} images/s", flush=True)
        found = _open_entry(entry, shape)
        assert found is not None
        return found

    def _start(self, unfinished: Path, shape: tuple[int, int]) -> int:
        """Return how many rows are there already; make an empty file and room for it if none are."""
        file, header = unfinished / "features.npy", npy_header(shape, np.float32)
        done = unfinished / "progress.json"
        if done.is_file() and file.is_file():
            rows = read_json(done)["rows"]
            if rows <= shape[0] and file.stat().st_size >= len(header) + rows * 4 * shape[1]:
                return rows
        shutil.rmtree(unfinished, ignore_errors=True)
        self._cache.mkdir(parents=True, exist_ok=True)
        needed = len(header) + 4 * shape[0] * shape[1]
        make_room(self._cache, needed, self._used)
        unfinished.mkdir()
        file.write_bytes(header)
        return 0

    def _compute(self, engine: Engine, images: np.ndarray, folder: Path, rows: int, name: str) -> None:
        """Append the features of all images after the first ``rows``."""
        if rows:
            print(f"features of {name}: going on after {rows:,} of {len(images):,} images", flush=True)
        starts = range(rows, len(images), engine.batch_size)
        batches = (images[start : start + engine.batch_size] for start in starts)
        row_bytes = 4 * int(self._key["features"])
        with (folder / "features.npy").open("r+b") as file:
            # What stands after the last row that is known to be on the disk may be anything.
            file.truncate(len(npy_header((len(images), row_bytes // 4), np.float32)) + rows * row_bytes)
            file.seek(0, io.SEEK_END)
            with (
                stop_requests() as stop,
                progress(f"Features of {name}", len(images) - rows) as advance,
                contextlib.closing(engine.stream(batches)) as parts,
            ):
                saved = rows
                for part in parts:
                    if not np.isfinite(part).all():
                        raise NightlyError(
                            f"the features of {name} image {rows + int(np.argmin(np.isfinite(part).all(axis=1)))} are "
                            f"not finite in {self.engine}: look at model.weights, or set train.probe.precision float32"
                        )
                    file.write(part.tobytes())
                    rows += len(part)
                    advance(len(part))
                    if rows - saved >= FLUSH_ROWS or rows == len(images) or stop:
                        file.flush()
                        # On the disk before the count that vouches for it is.
                        os.fsync(file.fileno())
                        write_json(folder / "progress.json", {"rows": rows})
                        saved = rows
                    if stop and rows < len(images):
                        raise Interrupted(
                            f"computing features stopped by {signal.Signals(stop[0]).name} after {rows:,} of "
                            f"{len(images):,} {name} images; the same command goes on from there"
                        )

    def _engine(self) -> Engine:
        if self._opened is None:
            began = time.monotonic()
            self._opened = self._keras_engine() if self._gpu else self._openvino_engine()
            self.seconds["build"] += time.monotonic() - began
        return self._opened

    def _keras_engine(self) -> Engine:
        model = self._extractor if self.precision == "float32" else in_bfloat16(self._extractor)
        return KerasEngine(model, GPU_BATCH)

    def _openvino_engine(self) -> Engine:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "extractor.xml")
            write_openvino(self._extractor, file)
            model = read_openvino(file)
            if self._sample is not None:
                print(f"quantizing the backbone to int8 with {len(self._sample)} training images", flush=True)
                model = quantize(model, self._sample)
            return OpenVINOEngine(model, f"openvino-{self.precision}")

    def _engine_facts(self) -> tuple[str, dict[str, Any]]:
        """Return the engine in words, and what of it may change the numbers."""
        if self._gpu:
            import keras

            versions = {name: importlib.metadata.version(name) for name in ("keras", keras.backend.backend())}
            return f"Keras in {self.precision}", {**versions, "batch": GPU_BATCH}
        names = ["openvino"] + ["nncf"] * (self.precision == "int8")
        versions = {name: importlib.metadata.version(name) for name in names}
        return f"OpenVINO in {self.precision}", {**versions, "batch": CPU_BATCH}


def choose_precision(asked: str, gpu: bool) -> str:
    """Return the precision for ``asked``, ``auto`` included, on this machine.

    Raises:
        NightlyError: the processor does not compute in bfloat16.
    """
    if gpu:
        return "float32" if asked == "float32" else "bfloat16"
    if asked == "auto":
        return "bfloat16" if supports_bfloat16() else "float32"
    if asked == "bfloat16" and not supports_bfloat16():
        raise NightlyError(
            "train.probe.precision bfloat16 needs a processor with bfloat16 instructions; float32 and int8 work here"
        )
    return asked


def in_bfloat16(extractor: Any) -> Any:
    """Return a copy of a Keras model whose layers compute in bfloat16; those of a nested model too."""
    import keras

    def cast(layer: Any) -> Any:
        return type(layer).from_config({**layer.get_config(), "dtype": "mixed_bfloat16"})

    copy = keras.models.clone_model(extractor, clone_function=cast, recursive=True)
    copy.set_weights(extractor.get_weights())
    return copy


def make_room(cache: Path, needed: int, keep: Collection[Path]) -> None:
    """Remove the entries that were used longest ago until ``needed`` bytes more are within ``CACHE_BYTES``.

    Raises:
        NightlyError: the disk has not that much room even so.
    """
    entries = [path for path in cache.iterdir() if path.is_dir()]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
    total = sum(sizes.values())
    for path in sorted(set(entries) - set(keep), key=_last_use):
        if total + needed <= CACHE_BYTES:
            break
        shutil.rmtree(path)
        total -= sizes[path]
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise NightlyError(
            f"the features need {needed:,} bytes in {cache}, but only {free:,} are free: free some space and run the "
            "same command again, or lower augment.copies"
        )


def _last_use(entry: Path) -> float:
    facts = entry / "facts.json"
    return (facts if facts.exists() else entry).stat().st_mtime


def _open_entry(entry: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the features of a complete entry; None if there is none or it is damaged."""
    if not (entry / "facts.json").is_file():
        return None
    try:
        found = np.load(entry / "features.npy", mmap_mode="r")
    except (ValueError, OSError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """Return a SHA-256 over shape, dtype and content of arrays, memory-mapped ones in blocks."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        array = np.atleast_1d(array)
        rows = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
        for start in range(0, len(array), rows):
            digest.update(np.ascontiguousarray(array[start : start + rows]))
    return digest.hexdigest()
