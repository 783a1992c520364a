"""Progress of long work: a bar on a terminal, an occasional plain line in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

#: Seconds between two lines in a log.
LOG_INTERVAL_SECONDS = 30.0


class Advance(Protocol):
    """Call it with the number of units just done."""

    def __call__(self, count: int) -> None: ...


@contextmanager
def progress(description: str, total: int | None, unit: str = "images") -> Iterator[Advance]:
    """Yield a function that counts ``unit`` done out of ``total`` (None if unknown)."""
    bar = _terminal_bar if sys.stdout.isatty() else _log_lines
    with bar(description, total, unit) as advance:
        yield advance


@contextmanager
def _terminal_bar(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    import rich.progress as bars
    from rich.console import Console

    if unit == "bytes":
        counts = [bars.DownloadColumn(), bars.TransferSpeedColumn()]
    else:
        counts = [bars.MofNCompleteColumn(), bars.TextColumn(unit)]
    columns = [bars.TextColumn("{task.description}"), bars.BarColumn(), *counts, bars.TimeRemainingColumn()]
    # A console of its own: the one that all of rich shares may have been made while stdout was elsewhere.
    with bars.Progress(*columns, transient=True, console=Console()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _log_lines(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LOG_INTERVAL_SECONDS:
            last = now
            share = f" of {total:,}" if total else ""
            rate = done / (now - start)
            print(f"{description}: {done:,}{share} {unit}, {rate:,.{0 if rate >= 10 else 1}f}/s", flush=True)

    yield advance
