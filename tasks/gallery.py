"""The HTML page of one batch prediction: every row of it, and pictures of a sample.

Its policy allows its own script, by digest, and nothing else, whatever a file is called. All rows travel in the page
as gzipped JSON, which the script unpacks, filters and shows a hundred at a time; counts, charts, pictures and failures
are plain HTML and need no script.
"""

import base64
import gzip
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from natsort import natsorted
from PIL import Image

from tasks.charts import WIDTH, Plane, compact, round_percent, ticks
from tasks.files import write_text
from tasks.pages import allow_script, percent, pixelated, render, rows_of

#: Rows that are Python objects at the same time.
BLOCK_ROWS = 10_000
#: Pictures of a class: its least confident ones, and others drawn from all the rest.
LEAST, DRAWN = 28, 12
MOST_PICTURES = 1_500
#: Pictures in view at first; the classes after these are folded.
UNFOLDED = 600
#: Largest edge of a thumbnail in pixels, and the pixels of all of them: about 2 MB of photographs.
EDGE, PIXEL_BUDGET = 96, 5_000_000
#: Classes that a picture names.
TOP = 5
#: Failures listed of each status.
FAILURES = 10
BINS = 20
#: Confidences are compared and counted as whole millionths, here as in the script.
MILLION = 1_000_000

EXPLAINED = {
    "empty": "zero bytes",
    "not_an_image": "no image format starts like this",
    "unsupported": "an image of a kind that is not decoded",
    "truncated": "bytes are missing or damaged",
    "too_large": "more bytes or pixels than allowed",
    "unreadable": "no regular file, no permission or a failing disk",
    "vanished": "no longer there, or a link to nothing",
}


def write_gallery(
    destination: Path,
    rows: Iterable[pa.Table],
    summary: dict[str, Any],
    thumbnail: Callable[[str], np.ndarray | None],
    link: Callable[[str], str | None],
) -> None:
    """Write one self-contained HTML page about a prediction.

    Args:
        rows: tables with the columns of the prediction's schema, in the order of the files.
        summary: the content of summary.json; what is missing is not shown. Counts are taken from ``rows``.
        thumbnail: gives a path's uint8 (H, W, 3) RGB pixels, or None if it is gone; called from several threads.
        link: gives the relative URL under which a browser finds a path, or None.
    """
    gathered = _Gathered(link)
    for table in rows:
        for start in range(0, len(table), BLOCK_ROWS):
            gathered.add(table.slice(start, BLOCK_ROWS))
    drift = summary.get("drift") or {}
    threshold = summary.get("threshold")
    sections = _sections(gathered, thumbnail)
    cards = [card for section in sections for card in section["cards"]]
    page = render(
        "gallery.html",
        source=str(summary.get("source") or "Prediction"),
        heading=_heading(gathered.files, summary),
        drift={"level": drift.get("level"), "sentences": drift.get("sentences") or []} if drift else None,
        files=gathered.files,
        classified=int(gathered.images.total()),
        accepted=int(gathered.accepted.total()),
        threshold=threshold,
        classes=_class_rows(gathered),
        failed=[(status, n, EXPLAINED.get(status, "")) for status, n in gathered.failed()],
        histogram=_histogram(gathered.histogram, threshold),
        sections=sections,
        shown=len(cards),
        columns=max((len(section["cards"]) for section in sections), default=0),
        pixelated=all(card["small"] for card in cards),
        failures=_failures(gathered),
        names={"classes": list(gathered.classes), "statuses": list(gathered.statuses)},
        choices=natsorted(gathered.images),
        blocks=gathered.blocks,
        records=_records(summary, drift),
    )
    write_text(destination, allow_script(page))


class _Gathered:
    """What the page needs of all rows, taken in block by block; Python objects only of the block at hand."""

    def __init__(self, link: Callable[[str], str | None]) -> None:
        self._link = link
        self.files = 0
        #: Names by code; a file without a label has that of None.
        self.classes: dict[str | None, int] = {None: 0}
        self.statuses: dict[str, int] = {}
        self.images: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.by_status: Counter[str] = Counter()
        self.histogram = np.zeros(BINS, np.int64)
        self.blocks: list[str] = []
        self.sample: pa.Table | None = None
        self.failures: pa.Table | None = None

    def add(self, rows: pa.Table) -> None:
        """Take in the next rows."""
        columns = {name: rows[name].to_pylist() for name in ("path", "status", "reason", "label", "accepted")}
        labels = _codes(columns["label"], self.classes)
        statuses = _codes(columns["status"], self.statuses)
        confidences = rows["confidence"].to_numpy().astype(np.float64)
        millionths = np.rint(np.where(labels > 0, confidences, -1 / MILLION) * MILLION).astype(np.int64)
        # There is nothing to open where a file vanished.
        files = zip(columns["path"], columns["status"], strict=True)
        links = [None if status == "vanished" else self._link(path) for path, status in files]
        self.images.update(label for label in columns["label"] if label is not None)
        pairs = zip(columns["label"], columns["accepted"], strict=True)
        self.accepted.update(label for label, accepted in pairs if accepted and label is not None)
        self.by_status.update(columns["status"])
        bins = np.minimum(millionths[labels > 0] * BINS // MILLION, BINS - 1)
        self.histogram += np.bincount(bins, minlength=BINS)
        self.blocks.append(
            _packed(
                {
                    # Neighbors, so that gzip finds a path again in its link.
                    "names": [text for pair in zip(columns["path"], links, strict=True) for text in pair],
                    "labels": labels.tolist(),
                    "statuses": statuses.tolist(),
                    "reasons": [reason or "" for reason in columns["reason"]],
                    "confidences": millionths.tolist(),
                    "accepted": [int(bool(accepted)) for accepted in columns["accepted"]],
                    **{name: rows[name].to_pylist() for name in ("width", "height", "bytes")},
                }
            )
        )
        extra = {
            "row": np.arange(self.files, self.files + len(rows)),
            "code": labels,
            "kind": statuses,
            "millionths": millionths,
            "draw": np.array([zlib.crc32(path.encode()) for path in columns["path"]], np.int64),
        }
        for name in ("labels", "probabilities"):  # of which there may be a thousand
            rows = rows.set_column(rows.schema.get_field_index(name), name, pc.list_slice(rows[name], 0, TOP))
        rows = rows.append_column("link", pa.array(links, pa.string()))
        for name, values in extra.items():
            rows = rows.append_column(name, pa.array(values, pa.int64()))
        self.files += len(rows)
        self._keep_sample(rows.filter(pa.array(labels > 0)))
        self._keep_failures(rows.filter(pa.array(labels == 0)))

    def limit(self) -> int:
        """Return how many pictures of a class are shown."""
        return max(1, min(LEAST + DRAWN, MOST_PICTURES // max(1, len(self.images))))

    def failed(self) -> list[tuple[str, int]]:
        """Return each status but ``ok`` with its count, the most frequent first."""
        return [(status, count) for status, count in self.by_status.most_common() if status != "ok"]

    def chosen(self) -> list[dict[str, Any]]:
        """Return the rows to be shown as pictures, class by class, the least confident first."""
        if self.sample is None:
            return []
        limit = self.limit()
        drawn = limit * DRAWN // (LEAST + DRAWN)
        code, doubt, draw = (self.sample[name].to_numpy() for name in ("code", "millionths", "draw"))
        least = np.isin(np.arange(len(code)), _first(code, doubt, limit - drawn))
        rest = np.flatnonzero(~least)
        least[rest[_first(code[rest], draw[rest], drawn)]] = True
        order = np.lexsort((doubt, code))
        return self.sample.take(order[least[order]]).to_pylist()

    def _keep_sample(self, rows: pa.Table) -> None:
        """Keep of each class what can still be chosen, so that the sample does not grow with the rows."""
        rows = rows if self.sample is None else pa.concat_tables([self.sample, rows])
        code = rows["code"].to_numpy()
        kept = [_first(code, rows[name].to_numpy(), self.limit()) for name in ("millionths", "draw")]
        self.sample = rows.take(np.unique(np.concatenate(kept)))

    def _keep_failures(self, rows: pa.Table) -> None:
        rows = rows if self.failures is None else pa.concat_tables([self.failures, rows])
        self.failures = rows.take(np.sort(_first(rows["kind"].to_numpy(), rows["row"].to_numpy(), FAILURES)))


def _codes(names: Sequence[str | None], known: dict) -> np.ndarray:
    """Return each name's number in ``known``, which learns the new ones."""
    return np.array([known.setdefault(name, len(known)) for name in names], np.int64)


def _first(groups: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """Return the indexes of the ``count`` smallest keys of each group; among equal keys the first."""
    order = np.lexsort((keys, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return order[rank < count]


def _packed(value: Any) -> str:
    """Return a value as gzipped JSON in base64; the same value always gives the same text."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _heading(files: int, summary: dict[str, Any]) -> list[str]:
    """Return what the header says in short."""
    seconds, speed = summary.get("seconds"), summary.get("images_per_second")
    finished = summary.get("finished")
    moment = datetime.fromisoformat(finished).astimezone(UTC) if finished else None
    return [
        text
        for text in (
            f"model {summary['model_id']}" if summary.get("model_id") else "",
            str(summary.get("engine") or ""),
            f"{moment.day} {moment:%B %Y, %H:%M} UTC" if moment else "",
            f"{files:,} files" if files != 1 else "1 file",
            f"in {_duration(seconds)}" if seconds else "",
            f"{speed:,.0f} images/s" if speed else "",
        )
        if text
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _by_frequency(gathered: _Gathered) -> list[str]:
    return sorted(natsorted(gathered.images), key=lambda name: -gathered.images[name])


def _class_rows(gathered: _Gathered) -> list[dict[str, Any]]:
    """Return the classes found, the most frequent first."""
    most = max(gathered.images.values(), default=1)
    return [
        {
            "name": name,
            "images": gathered.images[name],
            "share": gathered.images[name] / most,
            "accepted": gathered.accepted[name],
            "filter": urlencode({"class": name}),
        }
        for name in _by_frequency(gathered)
    ]


def _sections(gathered: _Gathered, thumbnail: Callable[[str], np.ndarray | None]) -> list[dict[str, Any]]:
    """Return the classes with their pictures, the most frequent class first."""
    by_class: dict[str, list[dict[str, Any]]] = {}
    for row in gathered.chosen():
        by_class.setdefault(row["label"], []).append(row)
    names = _by_frequency(gathered)[:MOST_PICTURES]
    chosen = [row for name in names for row in by_class[name]]
    edge = int(min(EDGE, math.sqrt(PIXEL_BUDGET / max(1, len(chosen)))))

    def picture(path: str) -> tuple[str, bool]:
        pixels = thumbnail(path)
        return ("", True) if pixels is None else (_webp(pixels, edge), pixelated([pixels]))

    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="thumbnail") as pool:
        pictures = pool.map(picture, [row["path"] for row in chosen])
        sections, count = [], 0
        for name in names:
            cards = [_card(row, *next(pictures)) for row in by_class[name]]
            count += len(cards)
            sections.append({"name": name, "images": gathered.images[name], "cards": cards, "open": count <= UNFOLDED})
    return sections


def _card(row: dict[str, Any], picture: str, small: bool) -> dict[str, Any]:
    top = list(zip(row["labels"] or [row["label"]], row["probabilities"] or [row["confidence"]], strict=True))
    return {
        **{name: row[name] for name in ("row", "path", "link", "label", "confidence", "accepted")},
        "picture": picture,
        "small": small,
        "top": top,
    }


def _webp(pixels: np.ndarray, edge: int) -> str:
    """Return uint8 (H, W, 3) pixels as a WebP data URI, shrunk to at most ``edge`` pixels."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((edge, edge), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _failures(gathered: _Gathered) -> list[dict[str, Any]]:
    """Return the first failures of each status, the most frequent status first."""
    rows = [] if gathered.failures is None else gathered.failures.to_pylist()
    return [
        {
            "status": status,
            "count": count,
            "meaning": EXPLAINED.get(status, ""),
            "filter": urlencode({"status": status}),
            "rows": [row for row in rows if row["status"] == status],
        }
        for status, count in gathered.failed()
    ]


def _histogram(counts: np.ndarray, threshold: float | None) -> Markup:
    """Draw the images of each confidence; each bar is a link that selects its images."""
    marks = ticks(0, max(1, int(counts.max())), 4)
    top = max(marks[-1], counts.max() * 1.06)
    plane = Plane((0, 1), (0, top), 280)
    plane.axes([0, 0.2, 0.4, 0.6, 0.8, 1.0], marks, "confidence", round_percent, compact)
    template = (
        '<a href="#{filter}"><title>{hint}</title>'
        '<rect x="{x}" y="{high}" width="{width}" height="{full}" class="hit"/>'
        '<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="1" class="accent fill"/></a>'
    )
    for index, count in enumerate(counts.tolist()):
        low, high = index * 100 // BINS, (index + 1) * 100 // BINS
        if count:
            plane.add(
                template,
                filter=urlencode({"from": low, "below": high} if high < 100 else {"from": low}),
                hint=f"{low}% to {high}%: {count:,}",
                x=plane.x(low / 100) + 0.5,
                width=plane.x(high / 100) - plane.x(low / 100) - 1,
                high=plane.y(top),
                full=plane.y(0) - plane.y(top),
                y=plane.y(count),
                height=plane.y(0) - plane.y(count),
            )
    if threshold:
        plane.line((threshold, 0), (threshold, top), "accent dashed")
        side = "end" if plane.x(threshold) > WIDTH / 2 else "start"
        plane.text(
            plane.x(threshold) + (-4 if side == "end" else 4),
            10,
            f"accepted from {percent(threshold, 1)}",
            "accent",
            side,
        )
    return plane.svg("Images over confidence")


def _records(summary: dict[str, Any], drift: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    run = {name: value for name, value in summary.items() if name not in ("statuses", "labels", "drift")}
    seen = {name: value for name, value in drift.items() if name not in ("sentences", "views")}
    # A view's details are a figure for each class, or for each feature.
    views = drift.get("views") or {}
    seen |= {name: {k: v for k, v in view.items() if k != "details"} for name, view in views.items()}
    return [("Run", rows_of(run)), ("Drift", rows_of(seen))]
