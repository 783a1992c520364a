"""The plan of a prediction: what is classified, with what, in which shards; written first, so that a rerun goes on.

A result consists of ``plan/`` (``plan.json`` and ``files.parquet``), one ``predictions.parquet/part-NNNNN.parquet`` for
each shard and, once all shards are there, of the rest. In a local folder it is called ``.NAME.unfinished`` until then.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict

from tasks.errors import NightlyError
from tasks.images import Status
from tasks.inputs import Listing
from tasks.params import Section
from tasks.store import FILES, PARTS, PLAN, LocalStore, RemoteStore, Store, is_remote

FORMAT = 1
#: Statuses of which another look may make something else, although the file is as it was.
_TRANSIENT = {Status.UNREADABLE, Status.VANISHED}
#: Results that nobody named.
_BY_TIME = re.compile(r"\d{8}-\d{6}")
_FILES_SCHEMA = pa.schema([("path", pa.binary()), ("size", pa.int64()), ("mtime_ns", pa.int64())])


class Plan(Section):
    """What ``plan.json`` holds.

    Attributes:
        identity: everything that decides a row: source, model, engine, and options by their names on the command line.
        files: how many are classified.
        shard_files: how many of them make a shard, the last one perhaps fewer.
        listing: SHA-256 over path, size and time of every file.
        left_out: numbers of files found and not classified, by reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    identity: dict[str, Any]
    files: int
    shard_files: int
    listing: str
    left_out: dict[str, int]

    @property
    def shards(self) -> int:
        return math.ceil(self.files / self.shard_files)


def part_name(shard: int) -> str:
    """Return the name of a shard's file among the parts."""
    return f"part-{shard:05d}.parquet"


def shard_length(plan: Plan, shard: int) -> int:
    """Return how many files a shard has."""
    return min(plan.shard_files, plan.files - shard * plan.shard_files)


def unfinished(out: str) -> Store:
    """Return where the result ``out``, a path or an fsspec address, stands before it is complete."""
    if is_remote(out):
        return RemoteStore(out.rstrip("/"))
    path = Path(out).absolute()
    return LocalStore(path.with_name(f".{path.name}.unfinished"))


@contextlib.contextmanager
def scratch(store: Store) -> Iterator[Path]:
    """Yield a folder to unpack an archive in; what a killed run left there serves this one, which removes it."""
    if not isinstance(store, LocalStore):
        with tempfile.TemporaryDirectory(prefix="nightly-") as name:
            yield Path(name)
        return
    folder = store.folder.with_name(f"{store.folder.name}.scratch")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_plan(store: Store, identity: dict[str, Any], listing: Listing, shard_files: int) -> Plan:
    """Write the list of files, then the plan that vouches for it."""
    plan = Plan(
        identity=identity,
        files=len(listing.paths),
        shard_files=shard_files,
        listing=digest(listing),
        left_out={
            name: count
            for name, count in (
                ("hidden and side files", listing.side_files),
                ("by include and exclude", listing.excluded),
                ("named twice", listing.repeated),
            )
            if count
        },
    )
    store.clear()  # parts whose plan a killed process removed, or had not written yet, are of who knows what
    # A row group for each shard, so that whoever computes one reads no more.
    with store.writing(FILES) as file, pq.ParquetWriter(file, _FILES_SCHEMA) as table:
        for start in range(0, len(listing.paths), shard_files):
            rows = slice(start, start + shard_files)
            paths = [os.fsencode(path) for path in listing.paths[rows]]
            table.write_table(
                pa.table([paths, listing.sizes[rows], listing.mtimes[rows]], schema=_FILES_SCHEMA), shard_files
            )
    store.write(PLAN, json.dumps(plan.model_dump(), indent=2, ensure_ascii=False).encode())
    return plan


def read_plan(store: Store) -> Plan | None:
    """Return the plan in a store, None if there is none of this format."""
    data = store.read(PLAN)
    try:
        found = Plan(**json.loads(data)) if data else None
    except (ValueError, TypeError):
        return None
    return found if found and found.format == FORMAT else None


def adopt(store: Store, out: str, identity: dict[str, Any], listing: Listing) -> Plan | None:
    """Take over the plan and parts of a complete result of the same run on the same, unchanged files.

    That is ``out`` itself or, where that is named by its time as those of the nights are, such a one beside it, be it
    that a kill left it unfinished. Parts with files that could not be read are left behind: permissions and disks are
    mended without a trace in the listing.

    Returns:
        The plan, with the parts in ``store``; None if all results are of something else or there is none.
    """
    if not isinstance(store, LocalStore):
        return None
    here, listed = Path(out).absolute(), digest(listing)

    def serves(result: LocalStore) -> Plan | None:
        found = read_plan(result)
        return found if found and found.identity == identity and found.listing == listed else None

    for result in map(LocalStore, (here, *_beside(here, "[0-9]*-[0-9]*"))):
        if (found := serves(result)) and not missing_shards(result, found):
            return _copy(result, found, store)
    for result in map(LocalStore, _beside(here, ".[0-9]*-[0-9]*.unfinished")):
        with contextlib.suppress(NightlyError), result.locked():  # nobody is at work on it
            if found := serves(result):
                adopted = _copy(result, found, store)
                result.clear()
                return adopted
    return None


def _beside(here: Path, pattern: str) -> list[Path]:
    """Return the results beside one that is named by its time, newest first."""
    plans = here.parent.glob(f"{pattern}/{PLAN}") if _BY_TIME.fullmatch(here.name) else ()
    return sorted((path.parents[1] for path in plans), reverse=True)


def _copy(result: LocalStore, plan: Plan, store: LocalStore) -> Plan | None:
    store.clear()
    parts = [f"{PARTS}/{part_name(shard)}" for shard in range(plan.shards)]
    final = [name for name in parts if result.exists(name) and not _TRANSIENT & _statuses(result.folder / name)]
    # The plan comes last, since it vouches for the rest.
    for name in (*final, FILES, PLAN):
        with (result.folder / name).open("rb") as old, store.writing(name) as new:
            shutil.copyfileobj(old, new)
    return read_plan(store)


def read_shard(store: Store, shard: int) -> list[str]:
    """Return the paths of a shard's files."""
    with store.reading(FILES) as file:
        table = pq.ParquetFile(file).read_row_group(shard, columns=["path"])
    return [os.fsdecode(path) for path in table["path"].to_pylist()]


def missing_shards(store: Store, plan: Plan) -> list[int]:
    """Return the shards that have no part yet."""
    there = store.names(PARTS)
    return [shard for shard in range(plan.shards) if part_name(shard) not in there]


def require_same(plan: Plan, identity: dict[str, Any], where: str) -> None:
    """Refuse to go on with a plan that was made for something else.

    Raises:
        NightlyError: names every difference.
    """
    differences = [
        f"{name} was {_short(plan.identity.get(name))} and is {_short(identity.get(name))}"
        for name in sorted(plan.identity.keys() | identity.keys())
        if plan.identity.get(name) != identity.get(name)
    ]
    if differences:
        raise NightlyError(
            f"{where} holds a result of another run to go on with: {'; '.join(differences)}. "
            "Repeat that run's command to go on with it, give another --out, or start over with --fresh"
        )


def changed_files(store: Store, listing: Listing) -> int:
    """Return how many files were added, taken away or written since the plan was made."""
    with store.reading(FILES) as file:
        table = pq.read_table(file)
    planned = set(zip(table["path"].to_pylist(), table["size"].to_pylist(), table["mtime_ns"].to_pylist(), strict=True))
    found = set(zip(map(os.fsencode, listing.paths), listing.sizes.tolist(), listing.mtimes.tolist(), strict=True))
    return len({path for path, _, _ in planned ^ found})


def digest(listing: Listing) -> str:
    """Return a SHA-256 over path, size and time of every file, 64 hex digits."""
    found = hashlib.sha256()
    for path in listing.paths:
        found.update(os.fsencode(path) + b"\0")
    for numbers in (listing.sizes, listing.mtimes):
        found.update(np.ascontiguousarray(numbers, np.int64))
    return found.hexdigest()


def _statuses(part: Path) -> set[str]:
    return set(pq.ParquetFile(part).read(columns=["status"])["status"].unique().to_pylist())


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
