"""A planned prediction: made once, then any of its shards can be computed, here or by another process."""

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks import plan
from tasks.bundle import Bundle, load_bundle
from tasks.choice import choose_engine
from tasks.engines import open_engine
from tasks.errors import Interrupted, NightlyError
from tasks.inputs import Input
from tasks.outcome import PredictParams
from tasks.plan import Plan
from tasks.rows import Answering, write_parts
from tasks.signals import stop_requests
from tasks.store import Store


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
    answering = Answering(
        classes=bundle.classes,
        model_id=bundle.id,
        temperature=bundle.temperature,
        threshold=params.threshold if params.threshold is not None else (bundle.threshold or 0.0),
        top_k=len(bundle.classes) if params.all_probabilities else min(params.top_k, len(bundle.classes)),
    )
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
    if found is None:
        if not listing.paths:
            reasons = {"hidden or side files": listing.side_files, "left out by include and exclude": listing.excluded}
            left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
            raise NightlyError(f"'{source}' holds no images" + (f" ({left_out})" if left_out else ""))
        found = plan.write_plan(store, identity, listing, params.shard_files)
    elif plan.digest(listing) != found.listing:
        changed = plan.changed_files(store, listing)
    return Prediction(source, model, params, engine, why, store, found, bundle, answering), changed


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
        rows = write_parts(
            prediction.store, prediction.plan, shards, files, prediction.bundle.decode, engine, prediction.answering
        )
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
