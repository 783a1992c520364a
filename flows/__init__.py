"""When, in what order, with which states: Prefect round the tasks. The work itself is in ``tasks``.

The settings below must stand before Prefect is imported; whoever sets them outside wins.
"""

import os

QUIET = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The temporary server needs 9 s on a laptop, and 16 s to lay out a new database; Prefect gives up after 20.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # DVC alone decides what is up to date, and arrays never travel between tasks.
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    # Helpers that call get_run_logger outside of a flow (a test, a notebook) just work.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
