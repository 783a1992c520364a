"""How nights ended, kept for later, and told to whoever wants to know.

Addresses are those of apprise (``slack://…``, ``mailto://…``, ``json://host``) and hold passwords and tokens, so what
is said about one here names its place in the parameters and its kind, and never more of it.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from flows.workspace import Workspace
from tasks.errors import NightlyError
from tasks.files import append_line
from tasks.params import Section, parse_section, read_params_file

Event = Literal["promote", "hold", "failure", "recovery"]
State = Literal["promoted", "held", "unchanged", "skipped", "interrupted", "failed", "killed"]

#: Nights that came to their end. One that was skipped or interrupted says nothing about the next.
WELL = ("promoted", "held", "unchanged")
BADLY = ("failed", "killed")
#: For all notifications of a night together.
LIMIT_SECONDS = 20.0

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
#: Loggers that write addresses out.
_TALKATIVE = ("apprise", "urllib3.connectionpool")
_statuses: ContextVar[list[str] | None] = ContextVar("_statuses", default=None)


class _Masked(str):
    """Text that error messages, which quote what came, must not repeat."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "***"


def _masked(value: Any) -> Any:
    """Mask all text but the events and the names of keys."""
    if isinstance(value, str):
        return _Masked(value)
    if isinstance(value, list):
        return [_masked(item) for item in value]
    if isinstance(value, dict):
        # YAML 1.1 takes the word 'on' for True. An address that stands where a key should is no name.
        named = {"on" if key is True else "***" if ":" in str(key) else key: item for key, item in value.items()}
        return {key: item if key == "on" else _masked(item) for key, item in named.items()}
    return value


def _is_address(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not (_SCHEME.match(text) or _VARIABLE.match(text)):
        raise ValueError("must be an address of apprise such as 'mailto://…', 'json://host' or '${NIGHTLY_SLACK}'")
    return value


class Address(Section):
    """Whom to tell, and of what; a lone address is told of everything.

    Attributes:
        to: an address of apprise; ``${NAME}`` stands for an environment variable.
        on: the events that it is told of.
    """

    to: Annotated[SecretStr, AfterValidator(_is_address)]
    on: tuple[Event, ...] = Field(get_args(Event), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _lone_address(cls, value: Any) -> Any:
        return {"to": value} if isinstance(value, str) else value

    @property
    def kind(self) -> str:
        """What may be shown of it."""
        text = self.to.get_secret_value()
        if variable := _VARIABLE.match(text):
            return variable[0]
        return f"{_SCHEME.match(text)[1]}://…"


Addresses = Annotated[tuple[Address, ...], BeforeValidator(_masked)]


class _Notified(Section):
    notify: Addresses = ()


def read_addresses(params: Path) -> tuple[Address, ...]:
    """Return the addresses in a parameter file, also if other keys in it are wrong: of that somebody wants to know.

    Raises:
        NightlyError: it can't be read, or an address is none.
    """
    section = read_params_file(params).get("retrain")
    given = section.get("notify") if isinstance(section, dict) else None
    return parse_section({"notify": given} if given else {}, "retrain", _Notified, params).notify


def notify(
    addresses: Sequence[Address],
    events: Collection[Event],
    title: str,
    body: str,
    limit_seconds: float = LIMIT_SECONDS,
) -> list[str]:
    """Tell each address that wants to hear of one of the events; return a line for each that could not be told.

    All are told at the same time, and nobody waits for one that does not answer within the limit.
    """
    wanted = [(number, one) for number, one in enumerate(addresses) if set(one.on) & set(events)]
    kind = "failure" if "failure" in events else "warning" if "hold" in events else "success"
    deliveries = [_Delivery(number, address, kind, title, body) for number, address in wanted]
    for delivery in deliveries:
        delivery.start()
    deadline = time.monotonic() + limit_seconds
    troubles = []
    for delivery in deliveries:
        delivery.join(max(0.0, deadline - time.monotonic()))
        trouble = f"no answer within {limit_seconds:g} s" if delivery.is_alive() else delivery.trouble
        if trouble:
            troubles.append(f"notification failed: {_named(delivery.number, delivery.address)}: {trouble}")
    return troubles


def faults(addresses: Sequence[Address]) -> list[str]:
    """Return a line for each address that can't work as it stands, without telling anybody anything."""
    found = []
    for number, address in enumerate(addresses):
        try:
            with _overhearing():
                _sender(address)
        except NightlyError as fault:
            found.append(f"{_named(number, address)}: {fault}")
    return found


def _named(number: int, address: Address) -> str:
    return f"retrain.notify, address {number + 1} ({address.kind})"


def _sender(address: Address) -> Any:
    """Return what sends to an address.

    Raises:
        NightlyError: a variable is not set, or apprise can't make sense of it.
    """
    from apprise import Apprise, AppriseAsset

    text = address.to.get_secret_value()
    for name in _VARIABLE.findall(text):
        if not os.environ.get(name):
            raise NightlyError(f"the environment variable {name} is not set")
    text = _VARIABLE.sub(lambda found: os.environ[found[1]], text)
    asset = AppriseAsset(app_id="resnet-nightly", app_desc="nightly retraining", async_mode=False)
    service = Apprise.instantiate(text, asset=asset)
    if service is None:
        raise NightlyError("apprise can't make sense of it: see its list of services")
    sender = Apprise(asset=asset)
    sender.add(service)
    return sender


class _Delivery(threading.Thread):
    """One notification on its way; a thread that nobody has to wait for, not even the end of the process."""

    def __init__(self, number: int, address: Address, kind: str, title: str, body: str) -> None:
        super().__init__(name=f"notification {number + 1}", daemon=True)
        self.number, self.address = number, address
        self.trouble: str | None = None
        self._message = {"title": title, "body": body, "notify_type": kind, "body_format": "text"}

    def run(self) -> None:
        try:
            with _overhearing() as statuses:
                if not _sender(self.address).notify(**self._message):
                    status = f"it answered with status {statuses[-1]}" if statuses else ""
                    self.trouble = status or "it could not be reached, or refused"
        except NightlyError as fault:
            self.trouble = str(fault)
        except Exception as error:  # of any of apprise's hundred plugins; its text may hold the address
            self.trouble = type(error).__name__


@contextmanager
def _overhearing() -> Iterator[list[str]]:
    """Keep the talkative loggers of this thread silent; yield the HTTP statuses that they tell of."""
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_is_for_all)
    statuses: list[str] = []
    before = _statuses.set(statuses)
    try:
        yield statuses
    finally:
        _statuses.reset(before)


def _is_for_all(record: logging.LogRecord) -> bool:
    statuses = _statuses.get()
    if statuses is None:
        return True
    statuses += re.findall(r"\berror=(\d{3})\b", record.getMessage())
    return False


@dataclass(frozen=True)
class Record:
    """How a night ended. Times are UTC, ISO 8601."""

    run: str
    state: State
    started: str
    ended: str
    seconds: float
    headline: str


def record_night(
    workspace: Workspace, run: str, state: State, started: datetime, headline: str, ended: datetime | None = None
) -> Record:
    """Write down that a night has ended, just now unless ``ended`` says when."""
    ended = ended or datetime.now(UTC)
    seconds = round((ended - started).total_seconds(), 1)
    times = [moment.astimezone(UTC).isoformat(timespec="seconds") for moment in (started, ended)]
    record = Record(run, state, *times, seconds, headline)
    append_line(_file(workspace), json.dumps(asdict(record), ensure_ascii=False))
    return record


def nights(workspace: Workspace) -> list[Record]:
    """Return the nights on record, oldest first; a line that a crash tore is left out."""
    if not _file(workspace).exists():
        return []
    found = []
    for line in _file(workspace).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def last_success(workspace: Workspace) -> datetime | None:
    """Return when the last night came to its end, in UTC; also one with nothing to do or a model that was held.

    A night of the future was noted by a clock that was ahead, and does not count.
    """
    ends = [datetime.fromisoformat(record.ended) for record in nights(workspace) if record.state in WELL]
    return max((end for end in ends if end <= datetime.now(UTC)), default=None)


def events_of(state: State, earlier: Sequence[Record]) -> list[Event]:
    """Return what there is to tell of a night that ended in ``state`` after the ``earlier`` ones."""
    decided = [record.state for record in earlier if record.state in (*BADLY, *WELL)]
    told: dict[State, list[Event]] = {"promoted": ["promote"], "held": ["hold"], "failed": ["failure"]}
    recovered: list[Event] = ["recovery"] if decided and decided[-1] in BADLY and state in WELL else []
    return told.get(state, []) + recovered


def _file(workspace: Workspace) -> Path:
    return workspace.state / "nights.jsonl"
