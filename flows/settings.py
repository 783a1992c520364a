"""The whole of ``params.yaml`` as one validated thing, and the sections that belong to the flows."""

import asyncio
import difflib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, field_validator

from flows.notify import Addresses
from tasks.errors import NightlyError
from tasks.judge import JudgeParams
from tasks.params import Section, nearest, parse_section, read_params_file


class RetrainParams(JudgeParams):
    """The nightly run: when a challenger goes into service, and how long to be patient.

    Attributes:
        stage_time_limit_hours: a stage that runs longer is stopped; a training goes on with the next run.
        stop_grace_seconds: how long a stage that has to stop may take to save its work before it is killed.
        download_retries: further attempts at the download stage, the only one that is retried.
        download_retry_delay_seconds: the wait before each of them.
        dvc_patience_minutes: how long to wait for another DVC command in the workspace.
        maximum_lateness_hours: a scheduled run that starts later than this is skipped, so that three nights
            without power do not become three retrainings in a row.
        publish: what a night makes known: "commit" sends data to DVC's remote and commits our files to the branch that
            is checked out, "push" pushes that commit as well.
        keep: how many registered models stay on this machine, the one in service and the one before it always among
            them; others are fetched from DVC's cache or remote when they are wanted. null: all.
        notify: whom to tell how a night ended: addresses of apprise, each alone or as ``{to: …, on: [failure]}``.
    """

    stage_time_limit_hours: Annotated[float, Field(gt=0)] = 12.0
    stop_grace_seconds: Annotated[float, Field(ge=0)] = 60.0
    download_retries: Annotated[int, Field(ge=0, le=20)] = 3
    download_retry_delay_seconds: Annotated[float, Field(ge=0)] = 60.0
    dvc_patience_minutes: Annotated[float, Field(ge=0)] = 10.0
    maximum_lateness_hours: Annotated[float, Field(gt=0)] = 6.0
    publish: Literal["none", "commit", "push"] = "none"
    keep: Annotated[int, Field(ge=1)] | None = None
    notify: Addresses = ()


class ServeParams(Section):
    """When the nightly run starts.

    Attributes:
        cron: five fields: minute, hour, day of month, month, day of week.
        timezone: IANA name; the hour stays the same through daylight saving time.
    """

    cron: str = "0 2 * * *"
    timezone: str = "UTC"

    @field_validator("cron")
    @classmethod
    def _cron_is_valid(cls, cron: str) -> str:
        from prefect.client.schemas.schedules import CronSchedule

        try:
            CronSchedule(cron=cron, timezone="UTC")
        except ValueError:
            raise ValueError("must be five cron fields such as '0 2 * * *' (every night at two)") from None
        return cron

    @field_validator("timezone")
    @classmethod
    def _timezone_exists(cls, name: str) -> str:
        known = available_timezones()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"must be an IANA time zone such as '{close[0] if close else 'Europe/Madrid'}'")
        return name


def fire_times(params: ServeParams, count: int = 3, start: datetime | None = None) -> list[datetime]:
    """Return the next ``count`` starts of the nightly run, in its own time zone."""
    from prefect.server.schemas.schedules import CronSchedule

    zone = ZoneInfo(params.timezone)
    schedule = CronSchedule(cron=params.cron, timezone=params.timezone)
    times = asyncio.run(schedule.get_dates(n=count, start=start or datetime.now(zone)))
    return [time.astimezone(zone) for time in times]


def schemas() -> dict[str, type[Section]]:
    """Return the schema of every section, in the order of the pipeline."""
    from tasks.augmentation import AugmentParams
    from tasks.classifier import ModelParams
    from tasks.download import DownloadParams
    from tasks.evaluate import EvaluateParams
    from tasks.export import ExportParams
    from tasks.predict import PredictParams
    from tasks.prepare import PrepareParams
    from tasks.recipe import TrainParams
    from tasks.study import StudyParams
    from tasks.vetting import InboxParams

    return {
        "inbox": InboxParams,
        "download": DownloadParams,
        "prepare": PrepareParams,
        "augment": AugmentParams,
        "model": ModelParams,
        "train": TrainParams,
        "export": ExportParams,
        "evaluate": EvaluateParams,
        "predict": PredictParams,
        "retrain": RetrainParams,
        "serve": ServeParams,
        "study": StudyParams,
    }


def read_settings(path: Path) -> dict[str, Section]:
    """Return every section of the parameter file, validated; a missing section has its defaults.

    Raises:
        NightlyError: the first section, key or value that is not allowed, and what is.
    """
    values = read_params_file(path)
    known = schemas()
    for name in values:
        if name not in known:
            raise NightlyError(f"{path}: unknown section '{name}', {nearest(str(name), list(known))}")
    return {name: parse_section(values.get(name) or {}, name, schema, path) for name, schema in known.items()}
