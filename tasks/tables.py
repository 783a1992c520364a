"""What is made of the parts once all are there: counts, CSV and JSON Lines, in one pass over the rows."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from tasks.plan import Plan, part_name
from tasks.rows import SCHEMA, TALLY
from tasks.store import PARTS, TABLES, LocalStore, Store
from tasks.tally import Tally

#: The dataset's schema, where Parquet's readers look for it.
SCHEMA_FILE = f"{PARTS}/_common_metadata"


@dataclass
class Counts:
    """What a result's rows add up to."""

    files: int = 0
    bytes: int = 0
    accepted: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        return self.files - self.statuses["ok"]

    def add(self, rows: pa.Table) -> None:
        self.files += len(rows)
        self.bytes += rows["bytes"].combine_chunks().sum().as_py() or 0
        self.accepted += rows["accepted"].combine_chunks().true_count
        for name, counter in (("status", self.statuses), ("label", self.labels)):
            for found in rows[name].drop_null().value_counts().to_pylist():
                counter[found["values"]] += found["counts"]


def read_parts(store: Store, plan: Plan) -> Iterator[pa.Table]:
    """Yield the rows of each shard in order."""
    for shard in range(plan.shards):
        yield _part(store, shard).read()


def read_tally(store: Store, plan: Plan) -> Tally:
    """Return what all parts' images add up to; in the order of the shards, whoever computed them."""
    tally = Tally()
    for shard in range(plan.shards):
        tally.merge(Tally.from_bytes(_part(store, shard).schema_arrow.metadata[TALLY]))
    return tally


def write_tables(store: Store, plan: Plan, formats: Collection[str]) -> Counts:
    """Write the dataset's schema and the other ``formats`` (``csv``, ``jsonl``); return what the rows add up to."""
    counts = Counts()
    with contextlib.ExitStack() as open_files:
        files = {name: open_files.enter_context(store.writing(TABLES[name])) for name in formats if name in TABLES}
        if "csv" in files:
            csv = open_files.enter_context(pa.csv.CSVWriter(files["csv"], _csv_view(SCHEMA.empty_table()).schema))
        for rows in read_parts(store, plan):
            counts.add(rows)
            if "csv" in files:
                csv.write_table(_csv_view(rows))
            if "jsonl" in files:
                lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in _json_view(rows))
                files["jsonl"].writelines(line.encode() for line in lines)
    with store.writing(SCHEMA_FILE) as file:
        pq.write_metadata(SCHEMA, file)
    return counts


def _part(store: Store, shard: int) -> pq.ParquetFile:
    name = f"{PARTS}/{part_name(shard)}"
    if isinstance(store, LocalStore):
        return pq.ParquetFile(store.folder / name)
    return pq.ParquetFile(io.BytesIO(store.read(name) or b""))


def _csv_view(rows: pa.Table) -> pa.Table:
    """Return the rows with their lists as JSON text, since CSV has no lists, and floats as they print shortest."""
    for name in ("labels", "probabilities"):
        values = rows[name].to_pylist()
        if name == "probabilities":
            values = [None if value is None else [_shortest(share) for share in value] for value in values]
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(texts, pa.string()))
    return rows


def _json_view(rows: pa.Table) -> Iterator[dict]:
    for row in rows.to_pylist():
        if row["label"] is not None:
            row["confidence"] = _shortest(row["confidence"])
            row["probabilities"] = [_shortest(share) for share in row["probabilities"]]
        yield row


def _shortest(value: float) -> float:
    """Return the number of fewest digits that is the same in float32, so that 0.1 is no 0.10000000149011612."""
    return float(str(np.float32(value)))
