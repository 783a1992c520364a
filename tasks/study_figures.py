"""The depth study's figures: one panel for each family of networks, all on the same axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from tasks.charts import WIDTH, Plane, compact, round_percent, ticks
from tasks.study import depth

#: Okabe and Ito's colors, which people tell apart whatever colors they see; the page has its own for dark screens.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#7F7F7F")
#: The first tenth of a run may leave the top of the figures, as in the paper.
SETTLED = 0.1


@dataclass(frozen=True)
class Curve:
    """One network's errors over the iterations: (iteration, mean, lowest, highest) over the seeds."""

    network: str
    family: str
    training: list[tuple[int, float, float, float]]
    test: list[tuple[int, float, float, float]]


def label(network: str) -> str:
    """Write a network's name as the paper does."""
    letters = network.rstrip("0123456789")
    shown = {"resnet": "ResNet", "vgg": "VGG"}.get(letters, letters)
    return f"{shown}-{network.removeprefix(letters)}"


def draw(path: Path, curves: Sequence[Curve], every: Sequence[Curve] | None = None) -> None:
    """Write ``path``.png and .svg: a panel for each family, training error thin and dashed, test error bold.

    Args:
        every: all curves of the study, whose axes and colors are used; ``curves`` themselves if None.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = every or curves
    families = list(dict.fromkeys(curve.family for curve in curves))
    low, high = _error_range(every)
    tones = _tones(every)
    figure = Figure(figsize=(4.6 * len(families) + 0.6, 4.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for panel, family in zip(panels, families, strict=True):
        for curve in (curve for curve in curves if curve.family == family):
            color = COLORS[tones[curve.network]]
            for line, style in ((curve.training, {"lw": 1, "ls": "--"}), (curve.test, {"lw": 2})):
                x, mean, least, most = zip(*line, strict=True)
                panel.fill_between(x, [v * 100 for v in least], [v * 100 for v in most], color=color, alpha=0.13, lw=0)
                name = {"label": label(curve.network)} if "ls" not in style else {}
                panel.plot(x, [v * 100 for v in mean], color=color, **name, **style)
        panel.set(title=family, xlabel="iteration", ylim=(low * 100, high * 100), xlim=(0, None))
        panel.grid(color="#e4e4e4", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    panels[0].set_ylabel("error (%): training dashed, test bold")
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def chart(curves: Sequence[Curve], every: Sequence[Curve]) -> Markup:
    """Return one family's curves as inline SVG, on the axes of ``every`` curve."""
    low, high = _error_range(every)
    last = max(curve.test[-1][0] for curve in every)
    marks = [mark for mark in ticks(0, last, 4) if mark <= last]
    y_marks = [mark for mark in ticks(low, high, 6) if low <= mark <= high]
    plane = Plane((0, last), (low, high), 300, right=70)
    plane.axes(marks, y_marks, "iteration", compact, round_percent)
    tones = _tones(every)
    for curve in curves:
        tone = f"net{tones[curve.network]}"
        for line, kind in ((curve.training, "train"), (curve.test, "test")):
            inside = [point for point in line if point[3] <= high]
            if inside:
                there = [f"{plane.x(x):.1f} {plane.y(most):.1f}" for x, _, _, most in inside]
                back = [f"{plane.x(x):.1f} {plane.y(least):.1f}" for x, _, least, _ in reversed(inside)]
                plane.add('<path d="M{d}Z" class="band {tone}"/>', d="L".join(there + back), tone=tone)
                middle = "L".join(f"{plane.x(x):.1f} {plane.y(mean):.1f}" for x, mean, _, _ in inside)
                plane.add('<path d="M{d}" class="line {kind} {tone}"/>', d=middle, kind=kind, tone=tone)
    previous = -math.inf
    for curve in sorted(curves, key=lambda curve: -curve.test[-1][1]):
        previous = max(plane.y(min(curve.test[-1][1], high)), previous + 13)
        plane.text(WIDTH - 64, previous + 3.5, label(curve.network), f"net{tones[curve.network]} name", "start")
    return plane.svg(f"Error over iterations: {', '.join(label(curve.network) for curve in curves)}")


def _tones(curves: Sequence[Curve]) -> dict[str, int]:
    """Return a color's number for each network: the same for a depth with and without shortcuts."""
    kinds: dict[str, set[int]] = {}
    for curve in curves:
        kinds.setdefault(_kind(curve), set()).add(depth(curve.network))
    return {curve.network: sorted(kinds[_kind(curve)]).index(depth(curve.network)) % len(COLORS) for curve in curves}


def _kind(curve: Curve) -> str:
    return curve.family.removeprefix("ResNet").removeprefix("plain")


def _error_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return round ends of the error axis that all figures share."""
    settled = [
        value
        for curve in curves
        for line in (curve.training, curve.test)
        for iteration, *values in line
        for value in values
        if iteration >= SETTLED * line[-1][0]
    ]
    marks = ticks(min(settled), max(settled), 8)
    return marks[0], marks[-1]
