"""Every night at the hour in ``params.yaml``: a process that runs the retraining flow on a schedule."""

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Self
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
from prefect.client.orchestration import get_client
from prefect.logging import get_logger
from prefect.runner import Runner
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows.retrain import retrain
from flows.settings import ServeParams
from tasks.errors import NightlyError

DEPLOYMENT = "nightly"

Look = Callable[[], Awaitable[None]]


class NightlyRunner(Runner):
    """Prefect's runner, made to stand for months.

    Its own end never awaits its coroutine and survives a Ctrl-C. And its loops, the one that looks for runs that are
    due and the one that looks for runs to cancel, give up after the third look in vain: four minutes without a server
    would end this process, and the night that is on in it.
    """

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        for service, look in (
            (self._scheduled_run_poller, "_get_and_submit_flow_runs"),
            (self._cancelling_observer, "_check_for_cancelled_flow_runs"),
        ):
            setattr(service, look, patiently(getattr(service, look)))
        return self

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


def fire_times(params: ServeParams, count: int = 3, start: datetime | None = None) -> list[datetime]:
    """Return the next ``count`` starts of the nightly run, in its own time zone."""
    from prefect.server.schemas.schedules import CronSchedule

    zone = ZoneInfo(params.timezone)
    schedule = CronSchedule(cron=params.cron, timezone=params.timezone)
    times = asyncio.run(schedule.get_dates(n=count, start=start or datetime.now(zone)))
    return [time.astimezone(zone) for time in times]


def register(params: ServeParams) -> tuple[NightlyRunner, UUID]:
    """Put the schedule on the server and return what will run it, with the deployment's id.

    Stopping the process leaves the schedule active, where Prefect's own default would pause it, so that a
    restart goes on with it.
    """
    runner = NightlyRunner(name=DEPLOYMENT, pause_on_shutdown=False)
    deployment_id = runner.add_flow(
        retrain,
        name=DEPLOYMENT,
        schedule=Cron(params.cron, timezone=params.timezone),
        paused=False,
        # The module, not its file: it is found wherever the package is installed.
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return runner, deployment_id


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
