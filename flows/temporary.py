"""A Prefect server for one command, where none is configured: it ends with the command, also if that is killed.

The one that Prefect itself would start lives on for ever when its starter is killed (`kill -9`, out of memory).
"""

import atexit
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from flows.child import GUARD
from tasks.errors import NightlyError

_GRACE_SECONDS = 5
_BETWEEN_LOOKS_SECONDS = 0.1


def start_temporary_server(log: Path) -> str:
    """Start a server on this machine, make this process and its children use it, and return its address.

    Its data are those of every Prefect server of this account without a database of its own, as with Prefect's.

    Args:
        log: receives what the server prints.

    Raises:
        NightlyError: it ended at once, or did not answer in the time that Prefect's settings give it.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
    # What Prefect sets for its own temporary one: no UI, no scheduler.
    only_the_api = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(_GRACE_SECONDS), *command],
            env={**os.environ, **only_the_api},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for this process, which then still has something to report to the server.
            start_new_session=True,
        )
    atexit.register(_end, guard)
    _await_answer(guard, url, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value(), log)
    os.environ["PREFECT_API_URL"] = url
    # Prefect reads its environment once, when it is imported.
    refresh_global_settings_context()
    # It has no pages to look at.
    logging.getLogger("prefect.flow_runs").addFilter(lambda record: not str(record.msg).startswith("View at "))
    return url


def _await_answer(guard: "subprocess.Popen[bytes]", url: str, limit_seconds: float, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + limit_seconds
    while guard.poll() is None and time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/health", timeout=_GRACE_SECONDS).raise_for_status()
        except httpx.HTTPError:
            time.sleep(_BETWEEN_LOOKS_SECONDS)
        else:
            return
    code = guard.poll()
    _end(guard)
    what = f"did not answer within {limit_seconds:.0f} s" if code is None else f"ended with exit code {code}"
    raise NightlyError(f"the temporary Prefect server {what}: see {log}, or name one that stays with PREFECT_API_URL")


def _end(guard: "subprocess.Popen[bytes]") -> None:
    """Let the server end in order, and wait for it: the next command may want its database."""
    assert guard.stdin
    guard.stdin.close()
    guard.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
