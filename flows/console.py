"""How a run reads: expected errors without tracebacks everywhere, and in a terminal one calm line per event."""

import logging
import os

from tasks.errors import NightlyError, describe

#: What Prefect says about itself; states and errors are reported by the flow in plain words.
_CHATTER = ("Beginning flow run", "Finished in state", "Created task run", "Submitted task run")

#: Names this setting to the processes that a served flow runs in.
_CALM = "NIGHTLY_CALM"

_TERMINAL_FORMAT = {
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s  %(message)s",
    "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s  %(task_run_name)-9s %(message)s",
    # The digits and paths of a training log are not to be painted.
    "PREFECT_LOGGING_COLORS": "false",
}


class ExpectedErrors(logging.Filter):
    """Shortens what Prefect logs about an error that the user can mend to the one line that says how."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, NightlyError | OSError):
            record.msg, record.args = describe(error), ()
            record.exc_info = record.exc_text = None
            record.expected = True
        return True


class Calm(logging.Filter):
    """Leaves Prefect's own words out of a terminal, and says an expected error at most once.

    Args:
        who_tells: ``flow`` where the flow run says it; ``command`` where the command line does at its end.
    """

    def __init__(self, who_tells: str) -> None:
        super().__init__()
        self.error_teller = "prefect.flow_runs" if who_tells == "flow" else None
        self.chatter = _CHATTER if who_tells == "flow" else (*_CHATTER, "Crash detected! ")

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "expected", False):
            return record.name == self.error_teller
        return not str(record.msg).startswith(self.chatter)


def shorten_expected_errors() -> None:
    """Install :class:`ExpectedErrors`; only works after Prefect is imported, and more than once is no harm."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
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
