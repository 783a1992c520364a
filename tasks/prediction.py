"""A planned prediction: made once, then any of its shards can be computed, here or by another process."""

import contextlib
import functools
import hashlib
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tasks import plan
from tasks.bundle import Bundle, load_bundle
from tasks.choice import choose_engine
from tasks.engines import REFERENCE, Engine, open_engine
from tasks.errors import Interrupted, NightlyError
from tasks.inputs import Input, open_input
from tasks.outcome import PredictParams
from tasks.plan import Plan, part_name, shard_length
from tasks.rows import Answering, write_parts
from tasks.signals import stop_requests
from tasks.store import PARTS, SUMMARY, Store, open_store


@dataclass(frozen=True)
class Prediction:
    """A planned prediction with all that is needed to compute any of its shards.

    Attributes:
        model: the bundle's directory.
        store: where the plan and the parts are.
    """

    source: str
    model: Path
    params: PredictParams
    engine: str
    engine_reason: str
    store: Store
    plan: Plan
    bundle: Bundle
    answering: Answering


def plan_prediction(
    source: str,
    out: str,
    model: Path,
    params: PredictParams,
    files: Input,
    *,
    fresh: bool = False,
) -> tuple[Prediction, int]:
    """Write the plan, or go on with the one that is there.

    Returns:
        The prediction, and how many files changed since its plan was made.

    Raises:
        NightlyError: nothing to classify, no such bundle or engine, or the result there is of another run.
    """
    bundle = load_bundle(model)
    engine, why = choose_engine(bundle, params.engine, params.precision)
    store = plan.unfinished(out)
    if fresh:
        store.clear()
    answering = how_to_answer(bundle, params)
    identity = {
        "source": source,
        "include": list(params.include),
        "exclude": list(params.exclude),
        "model": bundle.id,
        "engine": engine,
        "threshold": answering.threshold,
        "temperature": answering.temperature,
        "top-k": answering.top_k,
    }
    found = plan.read_plan(store)
    if found is not None:
        plan.require_same(found, identity, out)
    listing = files.find(params.include, params.exclude)
    changed = 0
    # At an address a complete result is where an unfinished one is, and its rows are of the files as they were then.
    if found is not None and plan.digest(listing) != found.listing and store.exists(SUMMARY):
        found = None
    if found is None:
        if not listing.paths:
            reasons = {"hidden or side files": listing.side_files, "left out by include and exclude": listing.excluded}
            left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
            raise NightlyError(f"'{source}' holds no images" + (f" ({left_out})" if left_out else ""))
        found = None if fresh else plan.adopt(store, out, identity, listing)
        found = found or plan.write_plan(store, identity, listing, params.shard_files)
    elif plan.digest(listing) != found.listing:
        changed = plan.changed_files(store, listing)
    return Prediction(source, model, params, engine, why, store, found, bundle, answering), changed


def how_to_answer(bundle: Bundle, params: PredictParams) -> Answering:
    """Return what makes rows of a bundle's probabilities."""
    return Answering(
        classes=bundle.classes,
        model_id=bundle.id,
        temperature=bundle.temperature,
        threshold=params.threshold if params.threshold is not None else (bundle.threshold or 0.0),
        top_k=len(bundle.classes) if params.all_probabilities else min(params.top_k, len(bundle.classes)),
    )


def run_shards(prediction: Prediction, shards: list[int], files: Input, advance: Callable[[int], None]) -> float | None:
    """Classify ``shards`` in one stream; return the seconds until the first row was known.

    Raises:
        Interrupted: by SIGTERM or SIGINT; whole shards are kept.
    """
    if not shards:
        return None
    began, first = time.monotonic(), None
    engine = open_engine(prediction.bundle, prediction.engine, batch_size=prediction.params.batch_size)
    with stop_requests() as stop:
        rows = write_parts(prediction.store, shards, files, prediction.bundle.decode, engine, prediction.answering)
        with contextlib.closing(rows):
            for _ in rows:
                if first is None:
                    first = time.monotonic() - began
                advance(1)
                if stop:
                    raise Interrupted(
                        f"classifying stopped by {signal.Signals(stop[0]).name}; the same command goes on with the "
                        "first shard that is not whole"
                    )
    return first


@dataclass(frozen=True)
class Order:
    """All that another process needs to compute shards of a planned prediction, on a machine with the same files.

    Attributes:
        store: where the plan is and the parts go, a path or an fsspec address.
        model: the bundle's directory.
        plan: SHA-256 of the plan, which says the rest.
    """

    source: str
    store: str
    model: str
    batch_size: int | None
    plan: str


@dataclass(frozen=True)
class _Loaded:
    """What a process loads once for an order and all its threads share."""

    store: Store
    plan: Plan
    bundle: Bundle
    files: Input
    engine: Engine
    answering: Answering
    #: OpenVINO computes for several threads at once; Keras's predict functions are not made for that.
    turn: threading.Lock = field(default_factory=threading.Lock)


_loading = threading.Lock()


def make_order(prediction: Prediction) -> Order:
    """Return what ``classify_shard`` needs to know of a prediction."""
    return Order(
        source=prediction.source,
        store=prediction.store.location,
        model=str(prediction.model.absolute()),
        batch_size=prediction.params.batch_size,
        plan=_digest(prediction.plan),
    )


def classify_shard(order: Order, shard: int) -> int:
    """Classify a shard's files in this process and write its part, unless it is there; return how many they are.

    Raises:
        NightlyError: this process does not see the plan or the model that the order was made for.
    """
    with _loading:
        loaded = _load(order)
    if loaded.store.exists(f"{PARTS}/{part_name(shard)}"):
        return shard_length(loaded.plan, shard)
    rows = write_parts(loaded.store, [shard], loaded.files, loaded.bundle.decode, loaded.engine, loaded.answering)
    with loaded.turn if loaded.engine.name == REFERENCE else contextlib.nullcontext():
        return sum(1 for _ in rows)


def unload() -> None:
    """Give back what ``classify_shard`` keeps in memory."""
    with _loading:
        _load.cache_clear()


@functools.lru_cache(maxsize=1)
def _load(order: Order) -> _Loaded:
    store, bundle = open_store(order.store), load_bundle(Path(order.model))
    found = plan.read_plan(store)
    if found is None or _digest(found) != order.plan:
        raise NightlyError(
            f"{order.store} holds {'another' if found else 'no'} plan: all workers must see the same files"
        )
    if bundle.id != found.identity["model"]:
        raise NightlyError(
            f"{order.model} holds model {bundle.id}, but the plan was made for {found.identity['model']}"
        )
    engine = open_engine(bundle, found.identity["engine"], batch_size=order.batch_size)
    # Two threads that bring OpenVINO their first arrays at the same moment wait for each other for ever.
    engine.probabilities(np.zeros((1, bundle.decode.size, bundle.decode.size, 3), np.uint8))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nightly-")))
        files = stack.enter_context(contextlib.closing(open_input(order.source, scratch)))
        loaded = _Loaded(
            store=store,
            plan=found,
            bundle=bundle,
            files=files,
            engine=engine,
            answering=Answering(
                classes=bundle.classes,
                model_id=bundle.id,
                temperature=found.identity["temperature"],
                threshold=found.identity["threshold"],
                top_k=found.identity["top-k"],
            ),
        )
        # Not before the last thread that uses it is done, and at the latest when the process ends.
        weakref.finalize(loaded, stack.pop_all().close)
    return loaded


def _digest(found: Plan) -> str:
    return hashlib.sha256(found.model_dump_json().encode()).hexdigest()
