"""Every night at the hour in ``params.yaml``: a process that runs the retraining flow on a schedule."""

import asyncio
import logging
import signal
import sys
from datetime import datetime
from uuid import UUID
from zoneinfo import ZoneInfo

from prefect.client.orchestration import get_client
from prefect.runner import Runner
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows.retrain import retrain
from flows.settings import ServeParams
from tasks.errors import NightlyError

DEPLOYMENT = "nightly"


class NightlyRunner(Runner):
    """Prefect's runner with an end that works: its own never awaits its coroutine and survives a Ctrl-C."""

    def handle_sigterm(self, number: int, *_: object) -> None:
        # Tasks that are cancelled on the way out have nothing to report.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        sys.exit(128 + number if number == signal.SIGINT else 0)


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
