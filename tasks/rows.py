"""Files in, rows out: fetch and decode on threads, batches through one engine, a Parquet part for each shard."""

import collections
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.calibration import apply_temperature
from tasks.engines import Engine, batched
from tasks.images import DecodePolicy, Status, decode
from tasks.inputs import Input
from tasks.plan import part_name, read_shard
from tasks.store import PARTS, Store
from tasks.tally import Tally, image_statistics

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
#: A part's metadata key for its ``Tally``.
TALLY = b"nightly.tally"
#: Files that a thread takes at once: fewer cost hand-overs, more leave threads idle at the end.
GROUP = 8
#: Rows whose statistics are summed up at once, counted from the shard's first, so that no sum depends on batches.
BLOCK = 256


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of one file, without its pixels."""

    path: str
    status: Status
    reason: str
    width: int
    height: int
    bytes: int
    statistics: np.ndarray | None


@dataclass(frozen=True)
class Answering:
    """What turns probabilities into a row, besides the model: a result's rows all have the same."""

    classes: Sequence[str]
    model_id: str
    temperature: float
    threshold: float
    top_k: int


def look(source: Input, policy: DecodePolicy, paths: Sequence[str]) -> list[tuple[Seen, np.ndarray | None]]:
    """Fetch and decode files; never raises. Exactly those that are ``ok`` have uint8 (size, size, 3) pixels."""
    found: list[tuple[Seen, np.ndarray | None]] = []
    for path in paths:
        fetched = source.fetch(path, policy.max_bytes)
        if fetched.data is None:
            assert fetched.status
            found.append((Seen(path, fetched.status, fetched.reason, 0, 0, fetched.size, None), None))
            continue
        decoded = decode(fetched.data, policy)
        statistics = None if decoded.pixels is None else image_statistics(decoded.pixels)
        seen = Seen(path, decoded.status, decoded.reason, decoded.width, decoded.height, len(fetched.data), statistics)
        found.append((seen, decoded.pixels))
    return found


def look_ahead(
    source: Input, policy: DecodePolicy, paths: Iterable[str], ahead: int
) -> Iterator[tuple[Seen, np.ndarray | None]]:
    """Yield what ``look`` gives, in order, while threads are at most ``ahead`` files further on."""
    # OpenCV's threads would compete with these.
    cv2.setNumThreads(1)
    remaining = iter(paths)
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        running: collections.deque[Future] = collections.deque()

        def submit(groups: int) -> None:
            for _ in range(groups):
                if group := list(itertools.islice(remaining, GROUP)):
                    running.append(pool.submit(look, source, policy, group))

        submit(max(2 * workers, -(-ahead // GROUP)))
        try:
            while running:
                found = running.popleft().result()
                submit(1)
                yield from found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def classify(
    source: Input, policy: DecodePolicy, paths: Iterable[str], engine: Engine
) -> Iterator[tuple[Seen, np.ndarray | None, np.ndarray | None]]:
    """Yield each file in order with its float32 (C,) probabilities and (F,) features, None where it has none."""
    waiting: collections.deque[tuple[Seen, bool]] = collections.deque()

    def pixels() -> Iterator[np.ndarray]:
        for seen, image in look_ahead(source, policy, paths, engine.batch_size * 4):
            waiting.append((seen, image is not None))
            if image is not None:
                yield image

    def failures() -> Iterator[tuple[Seen, None, None]]:
        while waiting and not waiting[0][1]:
            yield waiting.popleft()[0], None, None

    with closing(pixels()) as images:
        for probabilities, features in engine.outputs(batched(images, engine.batch_size)):
            for index in range(len(probabilities)):
                yield from failures()
                row = None if features is None else features[index]
                yield waiting.popleft()[0], probabilities[index], row
    yield from failures()


@dataclass
class Part:
    """The rows of a shard as they come."""

    answering: Answering
    columns: dict[str, list] = field(default_factory=lambda: {name: [] for name in SCHEMA.names})
    _block: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tally = Tally()

    def add(self, seen: Seen, probabilities: np.ndarray | None, features: np.ndarray | None) -> None:
        """Append a file's row; ``probabilities`` are the model's, before temperature scaling."""
        answer: dict[str, Any] = {"label": None, "confidence": None, "accepted": False}
        answer |= {"labels": None, "probabilities": None}
        if probabilities is not None:
            scaled = apply_temperature(probabilities[np.newaxis], self.answering.temperature)[0]
            best = np.argsort(-scaled, kind="stable")[: self.answering.top_k]
            labels, shares = [self.answering.classes[index] for index in best], scaled[best]
            answer = {"label": labels[0], "confidence": shares[0], "labels": labels, "probabilities": shares}
            answer["accepted"] = bool(shares[0] >= self.answering.threshold)
            assert seen.statistics is not None
            self._block.append((seen.statistics, scaled, features))
            if len(self._block) == BLOCK:
                self._count()
        row = {
            "path": printable(seen.path),
            "status": str(seen.status),
            "reason": seen.reason,
            "width": seen.width,
            "height": seen.height,
            "bytes": seen.bytes,
            "model_id": self.answering.model_id,
            **answer,
        }
        for name, values in self.columns.items():
            values.append(row[name])

    def table(self) -> pa.Table:
        """Return the rows, with the tally in the metadata."""
        self._count()
        return pa.table(self.columns, schema=SCHEMA).replace_schema_metadata({TALLY: self.tally.to_bytes()})

    def _count(self) -> None:
        if self._block:
            statistics, probabilities, features = zip(*self._block, strict=True)
            have = all(row is not None for row in features)
            self.tally.add(np.stack(statistics), np.stack(features) if have else None, np.stack(probabilities))
            self._block.clear()


def write_parts(
    store: Store,
    shards: Iterable[int],
    source: Input,
    policy: DecodePolicy,
    engine: Engine,
    answering: Answering,
) -> Iterator[Status]:
    """Classify the files of ``shards`` in one stream; publish each shard's part when its last row is there.

    Yields:
        Each file's status, as soon as its row is known.
    """
    lengths: collections.deque[tuple[int, int]] = collections.deque()

    def paths() -> Iterator[str]:
        for shard in shards:
            found = read_shard(store, shard)
            lengths.append((shard, len(found)))
            yield from found

    part = Part(answering)
    for seen, probabilities, features in classify(source, policy, paths(), engine):
        part.add(seen, probabilities, features)
        shard, length = lengths[0]
        if len(part.columns["path"]) == length:
            with store.writing(f"{PARTS}/{part_name(shard)}") as file:
                pq.write_table(part.table(), file, compression="zstd")
            lengths.popleft()
            part = Part(answering)
        yield seen.status


def printable(path: str) -> str:
    """Return ``path`` with bytes that are no UTF-8 written as ``\\xNN``, so that every table can hold it."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
