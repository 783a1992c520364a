"""A web server on this machine that does to a downloader what servers do: drop, stall, drip, lie, redirect."""

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


@dataclass
class Route:
    """How one address answers.

    ``drop_after``, ``stall_after`` and ``drip`` act on each response's body; ``drops`` bounds how many
    responses are cut, None for all.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ignore_ranges: bool = False
    honor_if_range: bool = True
    etag: str | None = None
    drop_after: int | None = None
    drops: int | None = None
    stall_after: int | None = None
    drip_bytes: int | None = None
    drip_seconds: float = 0.01
    announce_extra: int = 0
    announce_nothing: bool = False
    shift_range: int = 0
    fail_first: int = 0


@dataclass
class Request:
    """One request as it came, and how many bytes of body went back."""

    path: str
    headers: dict[str, str]
    status: int
    sent: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class MisbehavingServer:
    """Serves ``routes`` (path to Route) on a loopback port while its ``with`` block runs, and keeps ``requests``."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[Request] = []
        self.released = threading.Event()
        owner = self

        class Handler(_Handler):
            server_owner = owner

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # joined at the end, so that no socket outlives its test
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}{path}"

    def add(self, path: str, **behavior: object) -> str:
        """Serve ``path`` with this behavior; return its address."""
        self.routes[path] = Route(**behavior)
        return self.url(path)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Stop, and wait for every answer under way; after it ``requests`` change no more."""
        self.released.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_owner: MisbehavingServer

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output quiet."""

    def do_GET(self) -> None:
        owner = self.server_owner
        route = owner.routes[self.path]
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, route.status)
        owner.requests.append(request)
        self.close_connection = True
        if route.fail_first > 0:
            route.fail_first -= 1
            request.status = 503
        if request.status != 200:
            self._head(request, route, {"Content-Length": "0"})
            return
        start = self._start(request, route)
        if start is not None and start >= len(route.body):
            request.status = 416
            self._head(request, route, {"Content-Range": f"bytes */{len(route.body)}", "Content-Length": "0"})
            return
        body, lengths = route.body[start or 0 :], {}
        if start is not None:
            request.status = 206
            shifted = start + route.shift_range
            lengths["Content-Range"] = f"bytes {shifted}-{len(route.body) - 1}/{len(route.body)}"
        if not route.announce_nothing:
            lengths["Content-Length"] = str(len(body) + route.announce_extra)
        self._head(request, route, lengths)
        self._body(request, route, body)

    def _start(self, request: Request, route: Route) -> int | None:
        """Return the first byte asked for, or None if the whole file is to be sent."""
        if route.ignore_ranges or not request.range:
            return None
        validator = request.headers.get("if-range")
        if route.honor_if_range and validator is not None and validator != route.etag:
            return None
        return int(request.range.removeprefix("bytes=").removesuffix("-"))

    def _head(self, request: Request, route: Route, lengths: dict[str, str]) -> None:
        self.send_response(request.status)
        for name, value in {**lengths, **route.headers}.items():
            self.send_header(name, value)
        if route.etag:
            self.send_header("ETag", route.etag)
        self.send_header("Connection", "close")
        self.end_headers()

    def _body(self, request: Request, route: Route, body: bytes) -> None:
        cut = stall = None
        if route.drop_after is not None and route.drops != 0:
            cut = route.drop_after
            route.drops = None if route.drops is None else route.drops - 1
        if route.stall_after is not None:
            cut = stall = route.stall_after
        step = route.drip_bytes or 16384
        try:
            for offset in range(0, len(body[:cut]), step):
                piece = body[:cut][offset : offset + step]
                self.wfile.write(piece)
                request.sent += len(piece)
                if route.drip_bytes and self.server_owner.released.wait(route.drip_seconds):
                    return
        except (BrokenPipeError, ConnectionResetError):
            return  # the client had enough
        if stall is not None:
            self.server_owner.released.wait()
