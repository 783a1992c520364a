"""The exceptions people see as a line of text, and the wrapper that shows them that way."""

import errno
import os
import sys
from collections.abc import Callable

#: Exit code of a command that did not finish and goes on when it is run again (EX_TEMPFAIL of sysexits.h).
EXIT_INTERRUPTED = 75


class NightlyError(Exception):
    """Something the user can mend; its text names what was wrong, what is allowed and what came."""


class Interrupted(NightlyError):
    """A signal ended the work before it was done. What was done is saved, and the same command goes on from there."""


def run_main(main: Callable[[], object]) -> None:
    """Run a stage's ``main``; show what a user can mend as one line on stderr and exit with a code that says which.

    The codes are 1 for an error, ``EXIT_INTERRUPTED`` where the same command goes on, and a shell's 130 after a
    Ctrl-C that nothing was saved at. Other exceptions are defects of this software and keep their traceback.
    """
    try:
        main()
    except Interrupted as interruption:
        _end(f"interrupted: {interruption}", EXIT_INTERRUPTED)
    except (NightlyError, OSError) as error:
        _end(f"error: {describe(error)}", 1)
    except KeyboardInterrupt:
        _end("error: stopped by Ctrl-C", 130)


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: a deep-learning runtime's threads may not hold up a stage that has ended.
    os._exit(code)


def describe(error: BaseException) -> str:
    """Return one line for ``error``: the system's in plain words, and with their kind those that are none of ours."""
    text = str(error)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno == errno.ENOSPC:
            text = f"the disk is full{where}: free some space and run the same command again"
        elif error.errno == errno.EACCES:
            text = f"no permission{where}"
        elif error.strerror:
            text = f"{error.strerror}{where}"
    elif not isinstance(error, NightlyError):
        text = f"{type(error).__name__}: {error}" if text else type(error).__name__
    return " ".join(text.split())
