"""What a terminal is told when the Prefect server goes away in the middle of a run."""

import logging

import httpx
import pytest

from flows.console import Calm, ExpectedErrors, server_may_be_lost
from tasks.errors import NightlyError

LOST = "the Prefect server can't be reached"


def record(name: str, message: str, error: Exception | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(name, logging.ERROR, __file__, 1, message, ("https",), info)


def test_all_that_prefect_says_of_a_lost_server_is_one_line():
    calm = Calm("flow")
    first, second = record("prefect.events.clients", "Unable to %s", ValueError()), record("websockets.client", "%s")
    assert [calm.filter(first), calm.filter(second)] == [True, False]
    assert first.getMessage().startswith(LOST)
    assert first.exc_info is None
    assert calm.filter(record("prefect.runner", "%s"))


def test_a_lost_server_is_told_without_a_traceback():
    try:
        raise httpx.ConnectError("Connection refused")
    except httpx.ConnectError as error:
        told = record("prefect.flow_runs", "Encountered %s", error)
    assert ExpectedErrors().filter(told)
    assert told.getMessage() == f"{LOST} (Connection refused)"
    assert told.exc_info is None


def test_a_command_says_that_its_work_stands():
    told = rf"^{LOST} \(ConnectTimeout\) and does not know how this run ended; what the run did stands"
    with pytest.raises(NightlyError, match=told), server_may_be_lost():
        raise httpx.ConnectTimeout("")
    with pytest.raises(ValueError, match="no images"), server_may_be_lost():
        raise ValueError("no images")
