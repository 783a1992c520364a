"""What a run shows on Prefect's pages besides its log. None of it is worth the run: without a server it is left out."""

import re
import time
from collections.abc import Callable
from uuid import UUID

import httpx
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.stages import Emit

#: Seconds between two looks of the server at the same bar, and after one that went wrong.
BETWEEN_UPDATES_SECONDS = 5.0
AFTER_TROUBLE_SECONDS = 300.0

#: How tasks.loop and tasks.probe tell of an epoch, and tasks.progress of anything that takes long.
_EPOCH = re.compile(r"epoch (\d+)/(\d+): ")
_COUNT = re.compile(r"[A-Z][^:]*: ([\d,]+) of ([\d,]+) \w+, ")


def share_done(line: str) -> float | None:
    """Return how much of its work a stage has done, 0..1, if that is what the line says."""
    if found := _EPOCH.match(line) or _COUNT.match(line):
        done, total = (int(number.replace(",", "")) for number in found.groups())
        return min(done / total, 1.0) if total else None
    return None


class Progress:
    """The bar of one stage, which moves while the stage's lines come by; there is none where none of them counts."""

    def __init__(self, stage: str, warn: Emit) -> None:
        self._stage = stage
        self._warn = warn
        self._id: UUID | None = None
        self._next = 0.0
        self._last = ""

    def hear(self, line: str) -> None:
        """Move the bar if the line says how far the stage is."""
        if (share := share_done(line)) is None:
            return
        self._last = line
        if time.monotonic() >= self._next:
            self._show(share)

    def done(self) -> None:
        """Fill the bar, if there is one."""
        if self._id is not None:
            self._show(1.0)

    def _show(self, share: float) -> None:
        def show() -> None:
            if self._id is None:
                self._id = create_progress_artifact(100 * share, key=f"{self._stage}-progress", description=self._last)
            else:
                update_progress_artifact(self._id, 100 * share, description=self._last)

        # Once: whoever waits for a server here does not read what the stage says.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            shown = _attempt(show, self._warn)
        self._next = time.monotonic() + (BETWEEN_UPDATES_SECONDS if shown else AFTER_TROUBLE_SECONDS)


def show(key: str, text: str, headline: str, warn: Emit) -> None:
    """Show a summary, in markdown, on the page of its run."""
    _attempt(lambda: create_markdown_artifact(key=key, markdown=text, description=headline), warn)


def _attempt(show: Callable[[], object], warn: Emit) -> bool:
    try:
        show()
    except (httpx.HTTPError, PrefectException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        warn(f"not shown on Prefect's pages: the server did not take it ({reason})")
        return False
    return True
