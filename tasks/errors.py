"""The one exception people see as a line of text, and the wrapper that shows it that way."""

import errno
import os
import sys
from collections.abc import Callable


class NightlyError(Exception):
    """Something the user can mend; its text names what was wrong, what is allowed and what came."""


def run_main(main: Callable[[], object]) -> None:
    """Run a stage's ``main``; show what a user can mend as one line on stderr and exit with 1.

    Other exceptions are defects of this software and keep their traceback.
    """
    try:
        main()
    except (NightlyError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr, flush=True)
        # os._exit, not sys.exit: a deep-learning runtime's threads may not hold up a failed stage.
        sys.stdout.flush()
        os._exit(1)


def describe(error: NightlyError | OSError) -> str:
    """Return one line for ``error``; operating-system errors are put in plain words."""
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"the disk is full{where}: free some space and run the same command again"
        if error.errno == errno.EACCES:
            return f"no permission{where}"
        if error.strerror:
            return f"{error.strerror}{where}"
    return str(error)
