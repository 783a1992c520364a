"""How a run reads: expected errors without tracebacks everywhere, and in a terminal one calm line per event."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tasks.errors import NightlyError, describe

#: What Prefect says about itself; states and errors are reported by the flow in plain words.
_CHATTER = ("Beginning flow run", "Finished in state", "Created task run", "Submitted task run")

SERVER_LOST = "the Prefect server can't be reached"
#: Who has pages to say, or a line for each event that is lost, when the server can't be reached.
_MESSENGERS = (
    "prefect.events.clients",
    "prefect.FlowRunCancellingObserver",
    "prefect.FlowRunSuspendingObserver",
    "websockets.client",
    "EventsWorker",
)

#: Names this setting to the processes that a served flow runs in.
_CALM = "NIGHTLY_CALM"

_TERMINAL_FORMAT = {
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(task_run_name)-9s %(message)s",
    # The digits and paths of a training log are not to be painted.
    "PREFECT_LOGGING_COLORS": "false",
}


class ExpectedErrors(logging.Filter):
    """Shortens what Prefect logs about an error that the user can mend to the one line that says how.

    The flow talks to nobody by HTTP itself, so that such an error is the server's absence.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, NightlyError | OSError | httpx.TransportError):
            told = f"{SERVER_LOST} ({_reason(error)})" if isinstance(error, httpx.TransportError) else describe(error)
            record.msg, record.args = told, ()
            record.exc_info = record.exc_text = None
            record.expected = True
        return True


class Calm(logging.Filter):
    """Leaves Prefect's own words out of a terminal, and says an expected error or the loss of the server at most once.

    Args:
        who_tells: ``flow`` where the flow run says it; ``command`` where the command line does at its end.
    """

    def __init__(self, who_tells: str) -> None:
        super().__init__()
        self.error_teller = "prefect.flow_runs" if who_tells == "flow" else None
        self.server_lost = False
        self.chatter = _CHATTER if who_tells == "flow" else (*_CHATTER, "Crash detected! ")

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "expected", False):
            return record.name == self.error_teller
        if record.name in _MESSENGERS:
            first, self.server_lost = not self.server_lost, True
            record.msg, record.args = f"{SERVER_LOST}: a run goes on, and its page may lack something", ()
            record.exc_info = record.exc_text = None
            return first
        return not str(record.msg).startswith(self.chatter)


@contextmanager
def server_may_be_lost() -> Iterator[None]:
    """Turn the end of the server, in a flow run that has done its work all the same, into the one line that says so.

    Raises:
        NightlyError: in place of what Prefect's client raises.
    """
    try:
        yield
    except httpx.TransportError as error:
        raise NightlyError(
            f"{SERVER_LOST} ({_reason(error)}) and does not know how this run ended; what the run did stands, see "
            "'nightly history', and the next one puts the server right"
        ) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def shorten_expected_errors() -> None:
    """Install :class:`ExpectedErrors`; only works after Prefect is imported, and more than once is no harm."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if not any(isinstance(present, ExpectedErrors) for present in logger.filters):
            logger.addFilter(ExpectedErrors())
    if who_tells := os.environ.get(_CALM):
        for handler in logging.getLogger().handlers:
            if not any(isinstance(present, Calm) for present in handler.filters):
                handler.addFilter(Calm(who_tells))


def calm_terminal(who_tells: str) -> None:
    """Make the log of this process and its flow runs read well; only works before Prefect is imported."""
    for name, value in _TERMINAL_FORMAT.items():
        os.environ.setdefault(name, value)
    os.environ[_CALM] = who_tells
