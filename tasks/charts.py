"""Charts as inline SVG, for pages that load nothing from anywhere.

Colors come from the page's style sheet by class (``accent``, ``ink``, ``soft``, ``grid``), so a chart follows
dark mode and print. The same numbers always give the same bytes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from tasks.metrics import CalibrationBin
from tasks.pages import data_uri

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 12, 34
#: Beyond this the places at which a chart tells its values are further apart than its points.
READOUTS = 120


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (x, y); the class ``tone`` colors it; values that are not finite leave a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: str


class Plane:
    """A drawing area with linear axes; collects SVG elements."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        height: int,
        left: int = LEFT,
        right: int = RIGHT,
    ) -> None:
        self._x, self._y, self._height, self._left, self._right = x, y, height, left, right
        self._elements: list[Markup] = []

    def x(self, value: float) -> float:
        low, high = self._x
        return self._left + (value - low) / (high - low) * (WIDTH - self._left - self._right)

    def y(self, value: float) -> float:
        low, high = self._y
        return self._height - BOTTOM - (value - low) / (high - low) * (self._height - BOTTOM - TOP)

    def add(self, template: str, **values: object) -> None:
        """Add an element; floats are written with one decimal and everything is escaped."""
        shown = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in values.items()}
        self._elements.append(Markup(template).format(**shown))

    def text(self, x: float, y: float, text: str, tone: str = "soft", anchor: str = "middle") -> None:
        template = '<text x="{x}" y="{y}" class="{tone}" text-anchor="{anchor}">{text}</text>'
        self.add(template, x=float(x), y=float(y), text=text, tone=tone, anchor=anchor)

    def rectangle(self, x: tuple[float, float], y: tuple[float, float], tone: str, hint: str) -> None:
        """Fill the area between two x and two y values, one pixel apart from its neighbors."""
        self.add(
            '<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="1" class="{tone}">'
            "<title>{hint}</title></rect>",
            x=self.x(x[0]) + 0.5,
            y=self.y(y[1]),
            width=self.x(x[1]) - self.x(x[0]) - 1,
            height=self.y(y[0]) - self.y(y[1]),
            tone=tone,
            hint=hint,
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], tone: str) -> None:
        self.add(
            '<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{tone}"/>',
            x1=self.x(start[0]),
            y1=self.y(start[1]),
            x2=self.x(end[0]),
            y2=self.y(end[1]),
            tone=tone,
        )

    def axes(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_name: str,
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
    ) -> None:
        for tick in y_ticks:
            self.line((self._x[0], tick), (self._x[1], tick), "grid")
            self.text(self._left - 7, self.y(tick) + 3.5, y_text(tick), anchor="end")
        for tick in x_ticks:
            self.text(self.x(tick), self._height - BOTTOM + 15, x_text(tick))
        self.text((self._left + WIDTH - self._right) / 2, self._height - 3, x_name)

    def svg(self, description: str) -> Markup:
        template = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        return Markup(template).format(WIDTH, self._height, description, Markup("").join(self._elements))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers (1, 2 or 5 times a power of ten apart) that cover low to high."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def round_percent(share: float) -> str:
    """Write a share as a percentage without needless decimals."""
    return f"{share * 100:.4g}%"


def compact(count: float) -> str:
    """Write a count in at most five characters."""
    unit = ""
    for larger in "kMGT":
        if count < 999.5:  # what would be rounded to 1,000 takes the larger unit
            break
        count, unit = count / 1000, larger
    return f"{count:.3g}{unit}"


def line_chart(
    series: Sequence[Series],
    description: str,
    y_text: Callable[[float], str] = "{:g}".format,
    kept: float | None = None,
) -> Markup:
    """Draw lines over epochs, each named at its last point; a single point is drawn as a dot.

    Where the pointer is, the values are told, by style alone.

    Args:
        kept: the epoch whose weights became the model, marked if given.

    Returns:
        Nothing to draw gives an empty string.
    """
    finite = {s.name: [(x, y) for x, y in s.points if math.isfinite(y)] for s in series}
    shown = [s for s in series if finite[s.name]]
    if not shown:
        return Markup("")
    every = [point for s in shown for point in finite[s.name]]
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    x_range = (first, last) if last > first else (first - 1, first + 1)
    x_ticks = [t for t in ticks(*x_range) if first <= t <= last and t == int(t)] or [first]
    plane = Plane(x_range, (y_ticks[0], y_ticks[-1]), 220, right=70 if any(s.name for s in shown) else RIGHT)
    plane.axes(x_ticks, y_ticks, "epoch", "{:g}".format, y_text)
    if kept is not None and x_range[0] <= kept <= x_range[1]:
        plane.line((kept, y_ticks[0]), (kept, y_ticks[-1]), "accent dashed")
    for one in shown:
        if path := _path(one.points, plane):
            plane.add('<path d="{d}" class="line {tone}"/>', d=path, tone=one.tone)
        if len(finite[one.name]) == 1:
            x, y = finite[one.name][0]
            plane.add('<circle cx="{x}" cy="{y}" r="3" class="{tone}"/>', x=plane.x(x), y=plane.y(y), tone=one.tone)
    # By height alone: curves that end on the same value keep their order.
    labels = sorted(((plane.y(finite[s.name][-1][1]), s) for s in shown), key=lambda label: label[0])
    previous = -math.inf
    for at, one in labels:
        previous = max(at, previous + 13)
        plane.text(WIDTH - 64, previous + 3.5, one.name, tone=f"{one.tone} name", anchor="start")
    _tell(plane, shown, (y_ticks[0], y_ticks[-1]), x_range, y_text)
    return plane.svg(description)


def _tell(
    plane: Plane,
    series: Sequence[Series],
    y_range: tuple[float, float],
    x_range: tuple[float, float],
    y_text: Callable[[float], str],
) -> None:
    """Add invisible strips, one per epoch, that show its values while the pointer is on them."""
    values = [dict(one.points) for one in series]
    places = sorted(set().union(*values))
    places = places[:: math.ceil(len(places) / READOUTS)]
    edges = [x_range[0], *((a + b) / 2 for a, b in itertools.pairwise(places)), x_range[1]]
    for x, left, right in zip(places, edges[:-1], edges[1:], strict=True):
        told = [
            (one, points[x])
            for one, points in zip(series, values, strict=True)
            if math.isfinite(points.get(x, math.nan))
        ]
        if not told:
            continue
        words = ", ".join(f"{one.name} {y_text(float(f'{y:.4g}'))}".strip() for one, y in told)
        top, height = plane.y(y_range[1]), plane.y(y_range[0]) - plane.y(y_range[1])
        plane.add(
            '<g class="at"><rect x="{x}" y="{y}" width="{width}" height="{height}" class="hit"/><g>',
            x=plane.x(left),
            y=top,
            width=plane.x(right) - plane.x(left),
            height=height,
        )
        plane.line((x, y_range[0]), (x, y_range[1]), "ink gap")
        for one, y in told:
            plane.add('<circle cx="{x}" cy="{y}" r="3" class="{tone}"/>', x=plane.x(x), y=plane.y(y), tone=one.tone)
        plane.text(plane.x(sum(x_range) / 2), TOP - 4, f"epoch {x:g}: {words}", "ink")
        plane.add("</g></g>")


def _path(points: Sequence[tuple[float, float]], plane: Plane) -> str:
    """Return SVG path commands; a value that is not finite lifts the pen."""
    commands, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{pen}{plane.x(x):.1f} {plane.y(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(commands)


def reliability_diagram(bins: Sequence[CalibrationBin], threshold: float | None) -> Markup:
    """Draw each bin's accuracy as a bar and its gap to the diagonal, which is perfect calibration."""
    plane = Plane((0, 1), (0, 1), 330)
    marks = [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    plane.axes(marks, marks, "confidence", round_percent, round_percent)
    for b in bins:
        if b.images:
            hint = f"{b.correct:,} of {b.images:,} right, {b.accuracy:.1%}; mean confidence {b.confidence:.1%}"
            plane.rectangle((b.lower, b.upper), (0, b.accuracy), "accent fill", hint)
    plane.line((0, 0), (1, 1), "ink dashed")
    for b in bins:
        if b.images:
            at = (b.confidence, b.accuracy)
            plane.line((b.confidence, b.confidence), at, "ink gap")
            plane.add('<circle cx="{x}" cy="{y}" r="2.6" class="ink"/>', x=plane.x(at[0]), y=plane.y(at[1]))
    _mark_threshold(plane, threshold, 1.0)
    return plane.svg("Accuracy over confidence, by bin")


def confidence_histogram(bins: Sequence[CalibrationBin], threshold: float | None) -> Markup:
    """Draw the images of each confidence bin, right ones and mistakes stacked, with the count on top."""
    most = max((b.images for b in bins), default=0) or 1
    y_ticks = ticks(0, most, 4)
    top = max(y_ticks[-1], most * 1.06)
    plane = Plane((0, 1), (0, top), 330)
    plane.axes([0, 0.2, 0.4, 0.6, 0.8, 1.0], y_ticks, "confidence", round_percent, compact)
    for b in bins:
        if b.images:
            wrong = b.images - b.correct
            hint = f"{b.lower:.0%} to {b.upper:.0%}: {b.images:,} images, {wrong:,} mistakes"
            plane.rectangle((b.lower, b.upper), (0, b.correct), "accent fill", hint)
            plane.rectangle((b.lower, b.upper), (b.correct, b.images), "ink", hint)
            plane.text(plane.x((b.lower + b.upper) / 2), plane.y(b.images) - 4, compact(b.images))
    _mark_threshold(plane, threshold, top)
    return plane.svg("Number of images over confidence")


def _mark_threshold(plane: Plane, threshold: float | None, top: float) -> None:
    if threshold is not None and 0 < threshold < 1:
        plane.line((threshold, 0), (threshold, top), "accent dashed")


def interval_chart(value: float, low: float, high: float) -> Markup:
    """Draw a share and its interval on a scale that shows the interval well and ends at 100%."""
    floor = max(
        start for start in (0, 0.4, 0.6, 0.8, 0.9, 0.96, 0.98, 0.99) if start == 0 or 1 - start >= 3 * (1 - low)
    )
    marks = [floor, (floor + 1) / 2, 1.0]
    plane = Plane((floor, 1), (0, 1), 62, left=2, right=2)
    plane.line((floor, 0.5), (1, 0.5), "grid")
    plane.rectangle((low, max(high, low + 1e-9)), (0, 1), "accent fill", f"{low:.2%} to {high:.2%}")
    plane.add('<circle cx="{x}" cy="{y}" r="5" class="accent"/>', x=plane.x(value), y=plane.y(0.5))
    for mark, anchor in zip(marks, ("start", "middle", "end"), strict=True):
        plane.text(plane.x(mark), 48, round_percent(mark), anchor=anchor)
    return plane.svg(f"Accuracy {value:.2%}, interval {low:.2%} to {high:.2%}")


def heat(shares: np.ndarray | float) -> np.ndarray | float:
    """Return opacities for shares of a row; the power keeps rare mistakes visible beside a diagonal near 100%."""
    return shares**0.4


def heat_image(shares: np.ndarray) -> str:
    """Draw a matrix of shares 0..1 ``(R, C)`` as one picture, a pixel per cell, for matrices beyond a table."""
    pixels = np.empty((*shares.shape, 4), np.uint8)
    pixels[..., :3] = (46, 110, 142)
    pixels[..., 3] = np.rint(255 * heat(np.clip(shares, 0, 1)))
    return data_uri(Image.fromarray(pixels))
