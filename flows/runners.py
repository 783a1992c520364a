"""The shards of a prediction as Prefect tasks: on threads of this process, on Dask or on Ray."""

import contextlib
import importlib.util
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tasks import prediction
from tasks.device import GPU_SHARED
from tasks.engines import REFERENCE
from tasks.errors import NightlyError, describe
from tasks.inputs import Input
from tasks.plan import part_name

Where = Literal["threads", "dask", "ray"]
#: Shards at once on this machine: a second one keeps the processor busy while the first one starts and ends.
WORKERS = 2
#: Shards handed over at once; more than any cluster computes at a time, and few enough for any folder.
IN_FLIGHT = 256
RETRIES = 2
RETRY_DELAY_SECONDS = 2.0
CONNECT_SECONDS = 10.0
#: Failed shards after which the rest is not tried: then it is no matter of shards.
MANY = 20
#: Failed shards that an error names.
NAMED = 5


@task(
    name="shard",
    task_run_name="shard {shard}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAY_SECONDS,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def classify_shard(order: prediction.Order, shard: int, on: Where) -> int:
    """Classify one shard wherever this runs; return the number of its files."""
    if on != "threads":
        # Whose turn it is at a cluster's GPUs is the cluster's affair; a worker that kept one would keep it for ever.
        os.environ[GPU_SHARED] = "1"
    return prediction.classify_shard(order, shard)


def require(on: Where, address: str | None, workers: int | None) -> None:
    """Refuse what cannot work before anything is planned.

    Raises:
        NightlyError: the package is missing, nobody answers, or two parameters contradict each other.
    """
    if on != "threads" and importlib.util.find_spec(f"prefect_{on}") is None:
        raise NightlyError(f"on='{on}' needs prefect-{on}: pip install 'resnet-nightly[{on}]'")
    if address and on == "threads":
        raise NightlyError(f"'address' is a Dask scheduler's or Ray head's, but on is 'threads' (address: {address})")
    if address and workers:
        raise NightlyError(
            f"'workers' is for this machine, but the cluster at {address} has its own (workers: {workers})"
        )
    if address and address != "auto":  # Ray's word for the cluster that this machine is part of
        host, _, port = address.rpartition("/")[2].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            why = describe(error) if isinstance(error, OSError) else "an address ends with :port"
            raise NightlyError(f"no {on.title()} cluster answers at {address} ({why})") from None


def run_shards(
    on: Where,
    address: str | None,
    workers: int | None,
    planned: prediction.Prediction,
    shards: list[int],
    _files: Input,
    advance: Callable[[int], None],
) -> None:
    """Compute ``shards`` on workers, each as a task run that is tried again; one whose worker is lost runs elsewhere.

    Args:
        address: a Dask scheduler's or Ray head's; None starts a cluster of ``workers`` processes on this machine.

    Raises:
        NightlyError: shards failed in spite of that; the others are computed, unless it were too many.
    """
    if not shards:
        return
    order = prediction.make_order(planned)
    todo, running, failures = deque(shards), deque(), {}
    try:
        with opened(on, address, workers, planned.engine) as runner:
            while (todo or running) and len(failures) < MANY:
                while todo and len(running) < IN_FLIGHT:
                    shard = todo.popleft()
                    running.append((shard, runner.submit(classify_shard, {"order": order, "shard": shard, "on": on})))
                shard, future = running.popleft()
                try:
                    advance(future.result())
                except Exception as error:
                    # Whatever it is, from a file system's error to workers that died of it, the other shards count.
                    failures[shard] = describe(error)[:300]
    except BaseException as stopped:
        if not isinstance(stopped, Exception):  # a Ctrl-C, or the run was canceled
            get_run_logger().info("stopped: whole shards are kept, and the same call goes on with the others")
        raise
    if failures:
        named = "; ".join(f"{part_name(shard)}: {why}" for shard, why in list(failures.items())[:NAMED])
        raise NightlyError(
            f"{len(failures)} of {len(shards)} shards failed, also when tried again ({named}"
            f"{'; …' if len(failures) > NAMED else ''}); the same call goes on with what is missing"
        )


@contextlib.contextmanager
def opened(on: Where, address: str | None, workers: int | None, engine: str) -> Iterator[TaskRunner]:
    """Yield a running task runner whose tasks tell the flow run's own server how they fare."""
    workers = workers or WORKERS
    if on == "threads":
        try:
            with ThreadPoolTaskRunner(max_workers=workers) as runner:
                yield runner
        finally:
            prediction.unload()
        return
    # Workers report to the server of this flow run, even to a temporary one, of which no setting knows.
    with temporary_settings({PREFECT_API_URL: str(get_client(sync_client=True).api_url)}):
        runner = _dask(address, workers) if on == "dask" else _ray(address, workers)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(runner)
            except ConnectionError as error:
                raise NightlyError(f"{describe(error)}; is RAY_AUTH_MODE the same here as there?") from None
            if on == "ray" and address:
                stack.enter_context(_share(engine))
            yield runner


def _dask(address: str | None, workers: int) -> TaskRunner:
    # A worker that is told to stop in the middle of a shard has pages to say about it.
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")
    from prefect_dask import DaskTaskRunner

    if address:
        return DaskTaskRunner(address=address)
    # One thread each, since an engine uses all cores anyway. No limit: Dask's is a share of the memory by cores, and
    # it kills who passes it.
    local = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": "127.0.0.1:0"}
    return DaskTaskRunner(cluster_kwargs=local)


def _ray(address: str | None, workers: int) -> TaskRunner:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from prefect_ray import RayTaskRunner

    # "local", because without an address Ray would join any cluster that it finds on this machine.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if not address:
        options |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 128 * 1024 * 1024}
    return RayTaskRunner(address or "local", init_kwargs=options)


def _share(engine: str) -> contextlib.AbstractContextManager:
    """Give each shard a whole machine of a Ray cluster, whose cores an engine uses anyway, or one GPU for Keras.

    A task that asks for no GPU sees none.
    """
    import ray
    from prefect_ray.context import remote_options

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if engine == REFERENCE and any(machine.get("GPU") for machine in machines):
        return remote_options(num_gpus=1)
    return remote_options(num_cpus=min((machine["CPU"] for machine in machines if machine.get("CPU")), default=1))
