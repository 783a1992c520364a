"""The evaluation report of a model, as one HTML page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from tasks import charts
from tasks.metrics import CalibrationBin
from tasks.pages import pixelated, render, rows_of, thumbnail, thumbnail_edge

# Beyond this a table of cells is neither readable nor light, and becomes a picture.
MATRIX_CLASSES = 30
PAIRS = 8


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
        mistakes: wrong predictions, the most confident first.
        hits: right predictions, the least confident first.
        history: the rows of history.csv; may be empty.
        facts: the model bundle's ``created``, ``parameters``, ``training``, ``libraries``, ``decode``,
            ``normalization``, ``data_digest``, ``test_digest``, ``engines``, ``limits``.
        reference: name of the engine whose figures the metrics are.
        level: of the accuracy's interval.
        notes: sentences that the reader must see first.
        refused: engines that are not in ``metrics``, and what speaks against them.
    """

    metrics: Mapping[str, Any]
    classes: Sequence[str]
    matrix: np.ndarray
    bins: Sequence[CalibrationBin]
    mistakes: Sequence[Picture]
    hits: Sequence[Picture]
    history: pd.DataFrame
    facts: Mapping[str, Any]
    reference: str
    level: float = 0.95
    notes: Sequence[str] = ()
    refused: Sequence[tuple[str, str]] = ()


def render_report(data: ReportData) -> str:
    """Return the evaluation report as one HTML page."""
    metrics, facts, threshold = data.metrics, data.facts, data.metrics.get("threshold")
    small = len(data.classes) <= MATRIX_CLASSES
    widest = max(len(name) for name in data.classes)
    totals = data.matrix.sum(axis=1, keepdims=True)
    shares = data.matrix / np.maximum(totals, 1)
    pictures = [*data.mistakes, *data.hits]
    edge = thumbnail_edge(len(pictures) + sum(picture.heat is not None for picture in pictures))
    return render(
        "report.html",
        metrics=metrics,
        classes=data.classes,
        notes=data.notes,
        created=_readable_time(facts["created"]),
        digits=1 if metrics["test_images"] < 2000 else 2,
        guessing=math.log(len(data.classes)),
        interval=charts.interval_chart(metrics["accuracy"], metrics["accuracy_low"], metrics["accuracy_high"]),
        rows=_matrix_rows(data.matrix, shares, data.classes) if small else [],
        heat="" if small else charts.heat_image(shares),
        upright=widest > 4,
        edge=max(28, min(50, 600 // len(data.classes))),
        edge_narrow=max(24, min(40, 270 // len(data.classes))),
        pairs=_confused_pairs(data.matrix, data.classes),
        reliability=charts.reliability_diagram(data.bins, threshold),
        histogram=charts.confidence_histogram(data.bins, threshold),
        mistakes=[_picture_values(picture, edge) for picture in data.mistakes],
        hits=[_picture_values(picture, edge) for picture in data.hits],
        pixelated=pixelated([picture.pixels for picture in pictures]),
        curves=_curves(data.history, facts["training"].get("kept_epoch")),
        epochs=len(data.history),
        kept=facts["training"].get("kept_epoch"),
        training_time=_readable_seconds(facts["training"].get("seconds")),
        reference=data.reference,
        level=f"{data.level * 100:.3g}%",
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
        refused=data.refused,
        records=_records(facts, metrics),
    )


def _matrix_rows(matrix: np.ndarray, shares: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the table of confusions: a row per true class, a cell per predicted one."""
    rows = []
    for i, name in enumerate(classes):
        cells = []
        for j, (count, share) in enumerate(zip(matrix[i].tolist(), shares[i].tolist(), strict=True)):
            kind = " none" if not count else " same" if i == j else " strong" if share > 0.25 else ""
            heat = share if i == j else charts.heat(share)
            text = f"{share:.0%}" if share >= 0.01 or not count else "<1%"
            cells.append({"count": count, "share": text, "heat": f"{heat:.3f}", "kind": kind})
        rows.append({"name": name, "total": int(matrix[i].sum()), "cells": cells})
    return rows


def _confused_pairs(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the most frequent mistakes, the most frequent first, then in the order of the classes."""
    mistakes = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:PAIRS]
    places = [divmod(int(at), len(classes)) for at in order]
    return [
        {"target": classes[i], "label": classes[j], "count": int(matrix[i, j]), "share": matrix[i, j] / matrix[i].sum()}
        for i, j in places
        if mistakes[i, j]
    ]


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


def _records(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    parameters = facts["parameters"]
    data = {
        "model": metrics["model_id"],
        "training data": facts["data_digest"],
        "test data": metrics["test_digest"],
    }
    return [
        ("Digests", rows_of(data)),
        *((f"Parameters: {section}", rows_of(values)) for section, values in parameters.items()),
        ("Training", rows_of(facts["training"])),
        ("Decoding", rows_of(facts["decode"])),
        ("Normalization", rows_of(facts["normalization"])),
        ("Libraries", rows_of(facts["libraries"])),
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
