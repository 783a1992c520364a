"""The evaluation report of a model, as one HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from tasks import charts, confusions
from tasks.judge import FIGURES, LEVEL, hollow_figures
from tasks.metrics import CalibrationBin
from tasks.pages import allow_script, pixelated, render, rows_of, thumbnail, thumbnail_edge
from tasks.rival import Rival


@dataclass(frozen=True)
class Picture:
    """A test image, ``pixels`` uint8 ``(H, W, 3)``, and what the model said of it.

    ``top`` holds classes with their probabilities, the most probable first; ``target`` is always among them. ``heat``
    is the same picture with what spoke for the label painted over it, uint8 RGB of any size, shown beside it.
    """

    index: int
    pixels: np.ndarray
    target: str
    top: Sequence[tuple[str, float]]
    name: str = ""
    heat: np.ndarray | None = None


@dataclass(frozen=True)
class ReportData:
    """What the evaluation report shows.

    Attributes:
        metrics: the content of metrics.json.
        matrix: confusion counts ``(C, C)``, true classes in rows.
        predictions: a row per test image, see ``tasks.evaluate.Evaluation``; may have its ``name``.
        images: the test images, uint8 RGB ``(N, H, W, 3)``.
        bins: of the confidences; ``raw_bins`` those before temperature scaling.
        mistakes: wrong predictions, the most confident first.
        hits: right predictions, the least confident first.
        history: the rows of history.csv; may be empty.
        facts: the model bundle's ``created``, ``parameters``, ``training``, ``libraries``, ``decode``,
            ``normalization``, ``data_digest``, ``test_digest``, ``engines``, ``limits``, ``machine``.
        data: the content of prepared.json.
        class_counts: images by class, then by split.
        reference: name of the engine whose figures the metrics are.
        notes: sentences that the reader must see first.
        unmeasured: what there is to say of engines that are not in ``metrics``.
        rival: the model in service, if that is another one.
    """

    metrics: Mapping[str, Any]
    classes: Sequence[str]
    matrix: np.ndarray
    predictions: pd.DataFrame
    images: np.ndarray
    bins: Sequence[CalibrationBin]
    raw_bins: Sequence[CalibrationBin]
    mistakes: Sequence[Picture]
    hits: Sequence[Picture]
    history: pd.DataFrame
    facts: Mapping[str, Any]
    data: Mapping[str, Any]
    class_counts: Mapping[str, Mapping[str, int]]
    reference: str
    notes: Sequence[str] = ()
    unmeasured: Sequence[str] = ()
    rival: Rival | None = None


def render_report(data: ReportData) -> str:
    """Return the evaluation report as one HTML page, its only script a comfort that nothing depends on."""
    metrics, facts, threshold = data.metrics, data.facts, data.metrics.get("threshold")
    small = len(data.classes) <= confusions.MATRIX_CLASSES
    pictures = [*data.mistakes, *data.hits]
    edge = thumbnail_edge(len(pictures) + sum(picture.heat is not None for picture in pictures))
    tile = confusions.tile_edge(data.images)
    cells = confusions.choose_cells(
        data.matrix, data.predictions, data.classes, min(confusions.MOST, confusions.PIXEL_BUDGET // tile**2)
    )
    tiles = [index for cell in cells for index in cell.images]
    shares = confusions.row_shares(data.matrix)
    page = render(
        "report.html",
        metrics=metrics,
        classes=data.classes,
        notes=data.notes,
        created=_readable_time(facts["created"]),
        digits=1 if metrics["test_images"] < 2000 else 2,
        guessing=math.log(len(data.classes)),
        interval=charts.interval_chart(metrics["accuracy"], metrics["accuracy_low"], metrics["accuracy_high"]),
        rows=confusions.matrix_rows(data.matrix, data.classes, cells) if small else [],
        heat="" if small else charts.heat_image(shares),
        upright=max(len(name) for name in data.classes) > 4,
        edge=max(28, min(50, 600 // len(data.classes))),
        edge_narrow=max(24, min(40, 270 // len(data.classes))),
        pairs=[
            {"cell": f"cell-{i}-{j}", "target": data.classes[i], "label": data.classes[j]}
            | {"count": int(data.matrix[i, j]), "share": float(shares[i, j])}
            for i, j in confusions.confused_pairs(data.matrix)
        ],
        cells=confusions.cell_values(cells, data.predictions, data.classes),
        sheet=confusions.sheet(data.images, tiles, tile) if tiles else "",
        sheet_columns=min(confusions.COLUMNS, len(tiles)),
        sheet_rows=math.ceil(len(tiles) / confusions.COLUMNS),
        reliability=charts.reliability_diagram(data.bins, threshold),
        raw_reliability=charts.reliability_diagram(data.raw_bins, None) if metrics["temperature"] != 1 else "",
        histogram=charts.confidence_histogram(data.bins, threshold),
        mistakes=[_picture_values(picture, edge) for picture in data.mistakes],
        hits=[_picture_values(picture, edge) for picture in data.hits],
        heated=any(picture.heat is not None for picture in pictures),
        pixelated=pixelated([data.images[0]]),
        curves=_curves(data.history, facts["training"].get("kept_epoch")),
        epochs=len(data.history),
        kept=facts["training"].get("kept_epoch"),
        training_time=_readable_seconds(facts["training"].get("seconds")),
        reference=data.reference,
        engines=[
            {
                "name": name,
                **figures,
                "offered": facts["engines"].get(name, {}).get("offered", False),
                "speed": facts["engines"].get(name, {}).get("images_per_second"),
            }
            for name, figures in metrics["engines"].items()
        ],
        limits=facts["limits"],
        machine=facts.get("machine", {}),
        unmeasured=data.unmeasured,
        rival=data.rival,
        rival_level=f"{LEVEL * 100:.3g}%",
        compared=_compared(metrics, data.rival.metrics) if data.rival else [],
        data=data.data,
        class_counts=data.class_counts,
        records=_records(facts, metrics, data.data),
    )
    return allow_script(page)


def _compared(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures that both models have, with the difference and whether it is for the better."""
    rows, hollow = [], hollow_figures(new) | hollow_figures(old)
    for key, name, share, more_is_better in FIGURES:
        if key in new and key in old and key not in hollow:
            change = round(new[key] - old[key], 9)
            better = (change > 0) == more_is_better if change and more_is_better is not None else None
            values = {"key": key, "name": name, "share": share, "new": new[key], "old": old[key]}
            rows.append({**values, "change": change, "better": better})
    return rows


def _picture_values(picture: Picture, edge: int) -> dict[str, Any]:
    heat = "" if picture.heat is None else thumbnail(picture.heat, edge)
    return {**vars(picture), "source": thumbnail(picture.pixels, edge), "heat": heat}


def _curves(history: pd.DataFrame, kept: int | None) -> list[tuple[str, Markup]]:
    """Return (title, chart) for each pair of columns that the history has."""
    wanted = [
        ("Loss", "loss", "val_loss", "{:g}".format),
        ("Accuracy", "accuracy", "val_accuracy", charts.round_percent),
        ("Learning rate", "learning_rate", "", "{:g}".format),
    ]
    drawn = []
    for title, training, validation, y_text in wanted:
        lines = []
        for column, name, tone in ((training, "training", "ink"), (validation, "validation", "accent")):
            if column in history:
                points = list(zip(history["epoch"].tolist(), history[column].astype(float).tolist(), strict=True))
                lines.append(charts.Series(name if validation else "", points, tone if validation else "accent"))
        if chart := charts.line_chart(lines, f"{title} over epochs", y_text, kept):
            drawn.append((title, chart))
    return drawn


def _records(
    facts: Mapping[str, Any], metrics: Mapping[str, Any], prepared: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str]]]]:
    parameters = facts["parameters"]
    data = {
        "model": metrics["model_id"],
        "training data": facts["data_digest"],
        "test data": metrics["test_digest"],
        "source": prepared["source"].get("sha256"),
    }
    return [
        ("Digests", rows_of(data)),
        *((f"Parameters: {section}", rows_of(values)) for section, values in parameters.items()),
        ("Training", rows_of(facts["training"])),
        ("Source", rows_of({k: v for k, v in prepared["source"].items() if k != "sha256"})),
        ("Decoding", rows_of(facts["decode"])),
        ("Normalization", rows_of(facts["normalization"])),
        ("Libraries", rows_of(facts["libraries"])),
        ("Machine that measured the engines", rows_of(facts.get("machine", {}))),
    ]


def _readable_time(moment: str) -> str:
    """Write an ISO 8601 time for people, in UTC."""
    parsed = datetime.fromisoformat(moment)
    parsed = parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    return f"{parsed.day} {parsed:%B %Y, %H:%M} UTC"


def _readable_seconds(seconds: float | None) -> str:
    if not seconds:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
