"""How a run reads: expected errors without tracebacks everywhere, and in a terminal one calm line per event."""

import logging
import os

from tasks.errors import NightlyError, describe

#: What Prefect says about itself; states and errors are reported by the flow in plain words.
_CHATTER = ("Beginning flow run", "Finished in state", "Created task run", "Submitted task run")

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
    """Leaves Prefect's own words out of a terminal, and errors that the command line prints itself at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (getattr(record, "expected", False) or str(record.msg).startswith(_CHATTER))


def shorten_expected_errors() -> None:
    """Install :class:`ExpectedErrors`; a second call changes nothing."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(present, ExpectedErrors) for present in logger.filters):
            logger.addFilter(ExpectedErrors())


def calm_format() -> None:
    """Set the log format of a terminal; only works before Prefect is imported."""
    for name, value in _TERMINAL_FORMAT.items():
        os.environ.setdefault(name, value)


def calm_handlers() -> None:
    """Keep Prefect's own words out of the terminal; only works after Prefect is imported."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(Calm())
