"""The process that runs for months: its server goes and comes back, and the night that is on goes on."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from flows.serve import patiently
from tests.miniature import Miniature


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://127.0.0.1")
    return httpx.HTTPStatusError(f"status {status}", request=request, response=httpx.Response(status))


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("late"), answer(503)])
def test_the_absence_of_the_server_is_waited_for(error):
    async def look() -> None:
        raise error

    asyncio.run(patiently(look)())


def test_an_answer_that_it_is_wrong_is_an_error():
    async def look() -> None:
        raise answer(404)

    with pytest.raises(httpx.HTTPStatusError, match="404"):
        asyncio.run(patiently(look)())


class Line:
    """A way to a server that can be cut."""

    def __init__(self, url: str) -> None:
        self._server = (httpx.URL(url).host, httpx.URL(url).port)
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/api"
        self.there = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                near, _ = self._listener.accept()
                if not self.there:
                    near.close()
                    continue
                far = socket.create_connection(self._server)
                self._open += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.there = False
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._listener.close()


def wait(condition: Callable[[], bool], seconds: float = 60) -> float:
    """Return how long it took until ``condition`` held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.1)
    return time.monotonic() - start


@pytest.mark.slow
def test_a_night_outlives_its_server_and_is_canceled_from_the_ui_with_its_work_saved(tmp_path, server):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    workspace = Miniature(tmp_path)
    workspace.set(steps=10_000)
    line, said = Line(server), tmp_path / "said"
    settings = {"PREFECT_API_URL": line.url, "PREFECT_RUNNER_POLL_FREQUENCY": "1", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    with (
        contextlib.closing(line),
        said.open("w") as output,
        get_client(sync_client=True) as client,
        subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "serve"],
            cwd=tmp_path / "data",  # at the root, the miniature's own package would be found first
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
        ) as serve,
    ):
        try:
            wait(lambda: "next runs" in said.read_text())
            deployment = client.read_deployment_by_name("retrain/nightly")
            run = client.create_flow_run_from_deployment(deployment.id)
            wait(lambda: "from step" in said.read_text())
            line.cut()
            wait(lambda: said.read_text().count("does not answer, waiting for it") == 2)
            time.sleep(5)  # Prefect gives up after three looks in vain
            assert serve.poll() is None
            line.there = True
            wait(lambda: said.read_text().count("answers again") == 2)
            assert at_work(tmp_path)
            client.set_flow_run_state(run.id, Cancelling())
            assert wait(lambda: not at_work(tmp_path)) < 10
            wait(lambda: client.read_flow_run(run.id).state.is_cancelled())
            line.cut()  # for the second time, and both of its loops say so
            wait(lambda: said.read_text().count("does not answer, waiting for it") == 4)
            client.delete_deployment(deployment.id)  # as a server with a new database, which has none
            line.there = True
            wait(lambda: "has lost the schedule: registering it anew" in said.read_text())
            wait(lambda: said.read_text().count("answers again") == 4)
            again = client.read_deployment_by_name("retrain/nightly")
            assert again.id != deployment.id
            assert [entry.active for entry in again.schedules] == [True]
            client.delete_deployment(again.id)  # other tests share the server
        finally:
            serve.send_signal(signal.SIGTERM)
    step = int((tmp_path / "checkpoint").read_text())
    assert step > 100
    assert f"will go on from its checkpoint with the next run (stopped at step {step})" in said.read_text()


def at_work(folder: Path) -> bool:
    """Tell whether a stage runs in ``folder``."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").resolve() == folder and b"work.py" in (process / "cmdline").read_bytes():
                return True
    return False
