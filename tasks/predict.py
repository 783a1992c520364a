"""Classify images: one row for every file, in a stable order, whatever is wrong with some; a rerun goes on."""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from tasks import drift, plan, tables
from tasks.errors import NightlyError, run_main
from tasks.files import tidy_up
from tasks.images import decode
from tasks.inputs import Input, open_input
from tasks.outcome import PredictParams, PredictSummary, TooManyFailed
from tasks.params import read_section
from tasks.prediction import Prediction, plan_prediction, run_shards
from tasks.progress import progress
from tasks.store import OWN, REPORT, SUMMARY, LocalStore, RemoteStore, is_remote
from tasks.tally import Tally

THUMBNAIL_PIXELS = 96


def finish(prediction: Prediction, out: str, files: Input, summary: PredictSummary, began: float) -> None:
    """Make tables, report and summary of the parts, and put the result in its place."""
    summary.counts = tables.write_tables(prediction.store, prediction.plan, prediction.params.formats)
    reference = prediction.bundle.reference_file
    if reference.is_file():
        seen = tables.read_tally(prediction.store, prediction.plan)
        summary.drift = drift.compare(Tally.load(reference), seen, prediction.bundle.classes).facts()
    summary.seconds = time.monotonic() - began
    facts = summary.facts()
    if prediction.params.report:
        _write_report(prediction, out, files, facts)
        summary.report = f"{out}/{REPORT}"
    # Last: on an object store, its presence says that the result is complete.
    prediction.store.write(SUMMARY, (json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    if isinstance(prediction.store, LocalStore):
        prediction.store.publish(Path(out).absolute())


def predict(
    source: str | Path,
    out: str | Path,
    model: Path,
    params: PredictParams,
    *,
    fresh: bool = False,
    names: Callable[[], Iterable[bytes]] | None = None,
    sort_into: Path | None = None,
    sort_mode: Literal["link", "copy"] = "link",
    compute: Callable[[Prediction, list[int], Input, Callable[[int], None]], float | None] = run_shards,
) -> PredictSummary:
    """Classify every image of ``source`` and write the tables.

    Args:
        source: a directory, searched recursively; an image; a pattern; a text file of paths; a tar or zip archive;
            ``-`` for paths on standard input; or an fsspec address.
        out: a directory or an fsspec address; receives ``predictions.parquet/``, other formats, ``report.html`` and
            ``summary.json``. An unfinished result of the same run is gone on with, the rows of a complete one of the
            same run on unchanged files are taken over, any other result of this function is replaced once the new one
            is complete, and a directory with other things in it is refused.
        model: a bundle's directory.
        fresh: forget an unfinished result, and take over none.
        names: the lines of standard input.
        sort_into: receives a link to or copy of each classified file, in a folder for each class.
        compute: what classifies the missing shards, as ``run_shards`` does in this process.

    Raises:
        NightlyError: nothing to classify, no such bundle or engine, or ``out`` is in use.
        Interrupted: by SIGTERM or SIGINT; the same call goes on.
        TooManyFailed: see ``PredictParams``; the result is complete.
    """
    source, out = locate(str(source)), str(out)
    began = time.monotonic()
    _check_out(out)
    with contextlib.ExitStack() as stack:
        store = plan.unfinished(out)
        if isinstance(store, LocalStore):
            stack.enter_context(store.locked())
        scratch = stack.enter_context(plan.scratch(store))
        files = stack.enter_context(contextlib.closing(open_input(source, scratch, names)))
        prediction, changed = plan_prediction(source, out, model, params, files, fresh=fresh)
        summary = new_summary(prediction, out, changed)
        shards = plan.missing_shards(prediction.store, prediction.plan)
        todo = sum(plan.shard_length(prediction.plan, shard) for shard in shards)
        summary.resumed_files = prediction.plan.files - todo
        if summary.resumed_files:
            print(f"going on: {summary.resumed_files:,} of {prediction.plan.files:,} files are classified", flush=True)
        waited = time.monotonic() - began
        with progress("Classifying", todo, "files") as advance:
            first = compute(prediction, shards, files, advance)
        if first is not None:
            summary.first_image_seconds = waited + first
        finish(prediction, out, files, summary, began)
        if sort_into is not None:
            summary.sorted = _sort(prediction, out, files, sort_into, sort_mode)
    require_few_failures(summary, params)
    return summary


def locate(source: str) -> str:
    """Return a source as any process on this machine finds it: paths absolute, addresses and ``-`` as they are."""
    return source if source in ("", "-") or is_remote(source) else os.path.abspath(source)


def choose_out(folder: Path, source: str | Path) -> Path:
    """Return where below ``folder`` to put a result: on the newest unfinished one of the same source, or a new name.

    Whether that one is of the same model and options, the prediction itself makes sure of.
    """
    for entry in sorted(folder.glob(".*.unfinished"), reverse=True):
        out = folder / entry.name.removeprefix(".").removesuffix(".unfinished")
        found = plan.read_plan(plan.unfinished(str(out)))
        if found is not None and found.identity["source"] == locate(str(source)):
            return out
    return folder / f"{datetime.datetime.now():%Y%m%d-%H%M%S}"


def new_summary(prediction: Prediction, out: str, changed: int) -> PredictSummary:
    """Return the summary of a prediction before anything is counted."""
    return PredictSummary(
        source=prediction.source,
        out=out,
        model_id=prediction.bundle.id,
        engine=prediction.engine,
        engine_reason=prediction.engine_reason,
        threshold=prediction.answering.threshold,
        temperature=prediction.bundle.temperature,
        left_out=prediction.plan.left_out,
        changed_files=changed,
    )


def require_few_failures(summary: PredictSummary, params: PredictParams) -> None:
    """Raise if more files failed than the parameters allow.

    Raises:
        TooManyFailed: with the numbers and where the rows are.
    """
    counts, allowed = summary.counts, params.allowed_failures(summary.counts.files)
    if allowed is not None and counts.failed > allowed:
        statuses = ", ".join(f"{number:,} {name}" for name, number in counts.statuses.most_common() if name != "ok")
        limit = "none with --strict" if params.strict else f"{params.max_failed} with --max-failed"
        raise TooManyFailed(
            f"{counts.failed:,} of {counts.files:,} files failed ({statuses}), allowed: {limit}; "
            f"every row is in {summary.table}",
            summary,
        )


def _write_report(prediction: Prediction, out: str, files: Input, facts: dict[str, Any]) -> None:
    from tasks.gallery import write_gallery

    # The picture as it is, not as the model sees it.
    policy = prediction.bundle.decode.changed(size=THUMBNAIL_PIXELS, resize="pad")

    def thumbnail(path: str) -> np.ndarray | None:
        fetched = files.fetch(path, policy.max_bytes)
        return None if fetched.data is None else decode(fetched.data, policy).pixels

    def link(path: str) -> str | None:
        place = files.local(path)
        if place is None:
            return None
        return (
            place.absolute().as_uri()
            if is_remote(out)
            else quote(os.path.relpath(place.absolute(), Path(out).absolute()), errors="surrogateescape")
        )

    with tempfile.TemporaryDirectory(prefix="nightly-") as folder:
        page = Path(folder, REPORT)
        write_gallery(page, tables.read_parts(prediction.store, prediction.plan), facts, thumbnail, link)
        with prediction.store.writing(REPORT) as destination, page.open("rb") as content:
            shutil.copyfileobj(content, destination)


def _sort(prediction: Prediction, out: str, files: Input, destination: Path, mode: Literal["link", "copy"]) -> str:
    from tasks.sorting import sort_into

    store = RemoteStore(out) if is_remote(out) else LocalStore(Path(out))

    def rows() -> Iterator[tuple[str, str | None, bool, str]]:
        for shard, part in enumerate(tables.read_parts(store, prediction.plan)):
            columns = (part[name].to_pylist() for name in ("label", "accepted", "status"))
            yield from zip(plan.read_shard(store, shard), *columns, strict=True)

    counts = sort_into(destination, rows(), files, mode, prediction.bundle.decode.max_bytes)
    facts = {"present": "there already", "unsure": "unsure", "failed": "failed", "gone": "gone meanwhile"}
    rest = "".join(f", {number:,} {words}" for name, words in facts.items() if (number := getattr(counts, name)))
    return f"{counts.placed:,} {'links' if mode == 'link' else 'copies'} in {destination}{rest}"


def _check_out(out: str) -> None:
    """Refuse to replace anything but an earlier result."""
    if is_remote(out):
        return
    path = Path(out).absolute()
    if path.parent.is_dir():
        tidy_up(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise NightlyError(f"--out must be a directory, but '{path}' is a file")
    strangers = {entry.name for entry in path.iterdir()} - {name.split("/")[0] for name in OWN}
    if strangers:
        raise NightlyError(
            f"--out '{out}' holds other files ({sorted(strangers)[0]}): give a new directory or an earlier result's"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=predict.__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--fresh", action="store_true", help="forget an unfinished result")
    args = parser.parse_args()
    params = read_section(args.params, "predict", PredictParams)
    summary = predict(args.source, args.out, args.model, params, fresh=args.fresh)
    statuses = ", ".join(f"{count:,} {status}" for status, count in summary.counts.statuses.most_common())
    print(f"classified {summary.counts.files:,} files ({statuses}) with {summary.engine}: {summary.table}")
    for sentence in (summary.drift or {}).get("sentences", []):
        print(f"drift: {sentence}")


if __name__ == "__main__":
    run_main(main)
