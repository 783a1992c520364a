"""Classify a directory of images: one row for every file found, in a stable order, whatever is wrong with some."""

import argparse
import collections
import datetime
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from natsort import natsorted
from pydantic import Field

from tasks.bundle import Bundle, load_bundle
from tasks.choice import choose_engine
from tasks.engines import Engine, batched, open_engine
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory, write_json
from tasks.images import Decoded, DecodePolicy, read_and_decode
from tasks.params import Section, read_section
from tasks.progress import Advance, progress
from tasks.sources import is_side_file

TABLE, CSV_TABLE, SUMMARY = "predictions.parquet", "predictions.csv", "summary.json"
#: Rows written together; with the batches in flight, all that is ever in memory.
ROWS_PER_PART = 5_000
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("label", pa.string()),
        ("confidence", pa.float32()),
        ("accepted", pa.bool_()),
        ("labels", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("model_id", pa.string()),
    ]
)


class PredictParams(Section):
    """How a folder is classified.

    ``engine`` auto is Keras where a GPU is present, else OpenVINO; ``precision`` auto is the fastest of the
    engine that the export stage found to agree and this processor has. ``threshold`` null takes the bundle's.
    """

    engine: Literal["auto", "keras", "openvino"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    top_k: int = Field(3, ge=1)
    threshold: float | None = Field(None, ge=0, le=1)
    batch_size: int = Field(32, ge=1)


@dataclass
class PredictSummary:
    """What happened to a folder, as ``summary.json`` keeps it."""

    source: str
    out: Path
    model_id: str
    engine: str
    engine_reason: str
    threshold: float
    files: int = 0
    statuses: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    accepted: int = 0
    side_files: int = 0
    seconds: float = 0.0

    @property
    def table(self) -> Path:
        return self.out / TABLE

    def facts(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return {
            "source": self.source,
            "model_id": self.model_id,
            "engine": self.engine,
            "engine_reason": self.engine_reason,
            "threshold": self.threshold,
            "files": self.files,
            "side_files_left_out": self.side_files,
            "statuses": dict(self.statuses.most_common()),
            "labels": dict(self.labels.most_common()),
            "accepted": self.accepted,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.files / self.seconds, 1) if self.seconds else None,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def find_files(source: Path) -> tuple[list[str], int]:
    """Return the files below ``source`` as relative paths in natural order, and how many side files stood there.

    Links to files count as files; links to directories are not followed, so a loop of them ends at once.

    Raises:
        NightlyError: ``source`` does not exist.
    """
    if not source.exists():
        raise NightlyError(f"there is nothing at '{source}': give a directory of images or one image")
    if not source.is_dir():
        return [source.name], 0
    found, side_files = [], 0
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A link to a directory is listed among the directories, and not walked into.
        below = os.path.relpath(folder, source)
        for name in files:
            if is_side_file(name):
                side_files += 1
            else:
                found.append(name if below == "." else os.path.join(below, name))
    return natsorted(found), side_files


def classify(
    source: Path, paths: Iterable[str], policy: DecodePolicy, engine: Engine
) -> Iterator[tuple[str, Decoded, int, np.ndarray | None]]:
    """Yield path, decoding outcome, bytes read and float32 (C,) probabilities (None on failure), in order.

    Reading and decoding run ahead on threads, by a few batches at most.
    """
    waiting: collections.deque[tuple[str, Decoded, int]] = collections.deque()

    def pixels() -> Iterator[np.ndarray]:
        for path, outcome, size in _decode_ahead(source, paths, policy, engine.batch_size * 4):
            waiting.append((path, outcome, size))
            if outcome.pixels is not None:
                yield outcome.pixels

    for probabilities in engine.stream(batched(pixels(), engine.batch_size)):
        for row in probabilities:
            while waiting[0][1].pixels is None:
                yield (*waiting.popleft(), None)
            yield (*waiting.popleft(), row)
    while waiting:
        yield (*waiting.popleft(), None)


def _decode_ahead(
    source: Path, paths: Iterable[str], policy: DecodePolicy, ahead: int
) -> Iterator[tuple[str, Decoded, int]]:
    """Yield each file's outcome in order, while threads decode at most ``ahead`` files further on."""
    base = source if source.is_dir() else source.parent
    remaining = iter(paths)
    with ThreadPoolExecutor(thread_name_prefix="decode") as pool:

        def submit(path: str) -> tuple[str, Any]:
            return path, pool.submit(read_and_decode, base / path, policy)

        running = collections.deque(submit(path) for path in itertools.islice(remaining, ahead))
        while running:
            path, future = running.popleft()
            outcome, size = future.result()
            running.extend(submit(path) for path in itertools.islice(remaining, 1))
            yield path, outcome, size


def predict(source: Path, out: Path, model: Path, params: PredictParams) -> PredictSummary:
    """Classify every image below ``source`` and write the tables.

    Args:
        source: a directory, searched recursively, or one image.
        out: receives ``predictions.parquet``, ``predictions.csv`` and ``summary.json``, all or none. An earlier
            result of this function is replaced; any other directory with something in it is refused.
        model: a bundle's directory.

    Raises:
        NightlyError: nothing to classify, no such bundle or engine, or ``out`` is in use.
    """
    _check_out(out)
    bundle = load_bundle(model)
    paths, side_files = find_files(source)
    if not paths:
        left_out = f" ({side_files} hidden or side files were left out)" if side_files else ""
        raise NightlyError(f"'{source}' holds no images{left_out}")
    name, why = choose_engine(bundle, params.engine, params.precision)
    summary = PredictSummary(
        source=str(source),
        out=out,
        model_id=bundle.id,
        engine=name,
        engine_reason=why,
        threshold=params.threshold if params.threshold is not None else (bundle.threshold or 0.0),
        side_files=side_files,
    )
    started = time.monotonic()
    engine = open_engine(bundle, name, batch_size=params.batch_size)
    rows = _rows(classify(source, paths, bundle.decode, engine), bundle, summary, params.top_k)
    with publish_directory(out) as partial, progress("Classifying", len(paths), "files") as advance:
        with (
            pa.parquet.ParquetWriter(partial / TABLE, SCHEMA) as table,
            pa.csv.CSVWriter(partial / CSV_TABLE, _csv_view(SCHEMA.empty_table()).schema) as csv,
        ):
            counted = _count(rows, advance)
            while part := list(itertools.islice(counted, ROWS_PER_PART)):
                columns = pa.Table.from_pylist(part, schema=SCHEMA)
                table.write_table(columns)
                csv.write_table(_csv_view(columns))
        summary.seconds = time.monotonic() - started
        write_json(partial / SUMMARY, summary.facts())
    return summary


def _count(rows: Iterable[dict[str, Any]], advance: Advance) -> Iterator[dict[str, Any]]:
    """Pass rows on and count each as done: a part of the table is too coarse a step to watch."""
    for row in rows:
        yield row
        advance(1)


def _rows(outcomes: Iterable, bundle: Bundle, summary: PredictSummary, top_k: int) -> Iterator[dict[str, Any]]:
    """Turn outcomes into rows of the table, counting them in ``summary``."""
    for path, decoded, size, probabilities in outcomes:
        row: dict[str, Any] = {
            "path": printable(path),
            "status": str(decoded.status),
            "reason": decoded.reason,
            "accepted": False,
            "width": decoded.width,
            "height": decoded.height,
            "bytes": size,
            "model_id": bundle.id,
        }
        if probabilities is not None:
            best = np.argsort(-probabilities, kind="stable")[:top_k]
            row["labels"] = [bundle.classes[index] for index in best]
            row["probabilities"] = probabilities[best]
            row["label"] = row["labels"][0]
            row["confidence"] = probabilities[best[0]]
            row["accepted"] = bool(probabilities[best[0]] >= summary.threshold)
            summary.labels[row["label"]] += 1
            summary.accepted += row["accepted"]
        summary.files += 1
        summary.statuses[str(decoded.status)] += 1
        yield row


def printable(path: str) -> str:
    """Return ``path`` with bytes that are no UTF-8 written as ``\\xNN``, so that every table can hold it."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _csv_view(table: pa.Table) -> pa.Table:
    """Return the table with its lists as JSON text, since CSV has no lists."""
    for name in ("labels", "probabilities"):
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in table[name].to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def _check_out(out: Path) -> None:
    """Refuse to replace anything but an earlier result."""
    if not out.exists():
        return
    if not out.is_dir():
        raise NightlyError(f"--out must be a directory, but '{out}' is a file")
    strangers = {entry.name for entry in out.iterdir()} - {TABLE, CSV_TABLE, SUMMARY}
    if strangers:
        raise NightlyError(
            f"--out '{out}' holds other files ({sorted(strangers)[0]}): give a new directory or an earlier result's"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=predict.__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    summary = predict(args.source, args.out, args.model, read_section(args.params, "predict", PredictParams))
    statuses = ", ".join(f"{count:,} {status}" for status, count in summary.statuses.most_common())
    print(f"classified {summary.files:,} files ({statuses}) with {summary.engine}: {summary.table}")


if __name__ == "__main__":
    run_main(main)
