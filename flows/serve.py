"""Every night at the hour in ``params.yaml``: a process that runs the retraining flow on a schedule."""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger
from prefect.runner import Runner
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows.retrain import retrain
from flows.settings import ServeParams
from tasks.errors import NightlyError, describe

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

DEPLOYMENT = "nightly"
#: Between two questions to the server whether it knows the schedule.
BETWEEN_CHECKS_SECONDS = 60.0

Look = Callable[[], Awaitable[None]]


class NightlyRunner(Runner):
    """Prefect's runner, made to stand for months.

    Its own end never awaits its coroutine and survives a Ctrl-C. Its loops, the one that looks for runs that are due
    and the one that looks for runs to cancel, give up after the third look in vain: four minutes without a server
    would end this process, and the night that is on in it. And of a server with a new database it asks for the runs of
    a deployment that is not there, for ever.
    """

    def __init__(self, params: ServeParams) -> None:
        super().__init__(name=DEPLOYMENT, pause_on_shutdown=False)
        self._params = params
        self._next_check = 0.0

    def register(self) -> UUID:
        """Put the schedule on the server and return the deployment's id."""
        self.deployment_id: UUID = self.add_flow(retrain, **_deployment(self._params))
        return self.deployment_id

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        poller, observer = self._scheduled_run_poller, self._cancelling_observer
        look_for_runs = poller._get_and_submit_flow_runs

        async def look() -> None:
            try:
                await self._stay_registered()
                await look_for_runs()
            except httpx.HTTPError:
                self._next_check = 0.0  # a server that comes back may have a new database
                raise

        poller._get_and_submit_flow_runs = patiently(look)
        observer._check_for_cancelled_flow_runs = patiently(observer._check_for_cancelled_flow_runs)
        return self

    async def _stay_registered(self) -> None:
        """Put the schedule on the server again if that knows nothing of it any more; a paused one is left so."""
        if time.monotonic() < self._next_check:
            return
        try:
            await self._client.read_deployment(self.deployment_id)
        except ObjectNotFound:
            get_logger("serve").warning("the Prefect server has lost the schedule: registering it anew")
            try:
                self.deployment_id = await self.aadd_flow(retrain, **_deployment(self._params))
            except Exception as error:  # Prefect's own, of whatever kind, round whatever was wrong with the server
                get_logger("serve").warning("that did not work, and is tried again: %s", describe(error))
                return
        self._next_check = time.monotonic() + BETWEEN_CHECKS_SECONDS

    async def _cancel_run(self, flow_run: "FlowRun | UUID", state_msg: str | None = None) -> None:
        """Cancel a run, or leave it to the next look if the server is not there to hear of it.

        In a group of tasks with all others: what it raised would end this process.
        """
        try:
            await super()._cancel_run(flow_run, state_msg)
        except Exception as error:  # of the HTTP client or of the web socket that events go by
            get_logger("serve").warning("the server may not know yet of a cancellation: %s", error)
            run_id = flow_run if isinstance(flow_run, UUID) else flow_run.id
            self._cancelling_observer._cancelling_flow_run_ids.discard(run_id)

    def handle_sigterm(self, number: int, *_: object) -> None:
        # Tasks that are canceled on the way out have nothing to report.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        sys.exit(128 + number if number == signal.SIGINT else 0)


def patiently(look: Look) -> Look:
    """Return ``look``, which asks the server for something, such that the server's absence is no error, but a line."""
    logger = get_logger("serve")
    silent = False

    async def patient_look() -> None:
        nonlocal silent
        try:
            await look()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
                raise
            if not silent:
                reason = " ".join(str(error).split()) or type(error).__name__
                logger.warning("the Prefect server does not answer, waiting for it: %s", reason)
            silent = True
        else:
            if silent:
                logger.warning("the Prefect server answers again")
            silent = False

    return patient_look


def _deployment(params: ServeParams) -> dict[str, Any]:
    return {
        "name": DEPLOYMENT,
        "schedule": Cron(params.cron, timezone=params.timezone),
        "paused": False,
        # The module, not its file: it is found wherever the package is installed.
        "entrypoint_type": EntrypointType.MODULE_PATH,
    }


def register(params: ServeParams) -> tuple[NightlyRunner, UUID]:
    """Put the schedule on the server and return what will run it, with the deployment's id.

    Stopping the process leaves the schedule active, where Prefect's own default would pause it, so that a
    restart goes on with it.
    """
    runner = NightlyRunner(params)
    return runner, runner.register()


def require_active(deployment_id: UUID, params: ServeParams) -> None:
    """Raise unless the server will start runs by exactly this schedule."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment(deployment_id)
    active = [
        (entry.schedule.cron, entry.schedule.timezone)
        for entry in deployment.schedules
        if entry.active and hasattr(entry.schedule, "cron")
    ]
    if deployment.paused or active != [(params.cron, params.timezone)]:
        state = "paused" if deployment.paused else f"{active}"
        raise NightlyError(
            f"the server did not take the schedule '{params.cron}' {params.timezone}: it is {state}; "
            f"see 'prefect deployment inspect {retrain.name}/{DEPLOYMENT}'"
        )


def run_for_ever(runner: NightlyRunner) -> None:
    """Start runs when they are due, until this process is stopped; a run that is on then stops with it."""
    signal.signal(signal.SIGINT, runner.handle_sigterm)
    asyncio.run(runner.start())
