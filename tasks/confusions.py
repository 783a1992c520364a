"""What is taken for what: the matrix of a report, its commonest confusions, and the pictures behind its cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tasks import charts
from tasks.pages import data_uri

#: Beyond this a table of cells is neither readable nor light, and becomes a picture.
MATRIX_CLASSES = 30
#: Commonest confusions listed beside a table, and beside a picture, where they are the only way to the images.
PAIRS, MORE_PAIRS = 8, 24
#: Pictures behind a cell, and behind one of the diagonal.
MISTAKES, HITS = 24, 12
#: Edge of a picture behind a cell in pixels, and the pixels of all of them: at most some 1.5 MB of photographs.
EDGE, PIXEL_BUDGET = 48, 1_200_000
MOST = 1_500
COLUMNS = 40
#: Up to so many pixels the pictures behind cells are exact.
LOSSLESS_PIXELS = 200_000


@dataclass(frozen=True)
class Cell:
    """Test images of class ``target`` that were labeled ``label``, both indexes; ``images`` are those shown."""

    target: int
    label: int
    count: int
    images: Sequence[int]

    @property
    def id(self) -> str:
        return f"cell-{self.target}-{self.label}"


def confused_pairs(matrix: np.ndarray) -> list[tuple[int, int]]:
    """Return the most frequent mistakes (true, predicted), the most frequent first, then in the order of classes."""
    mistakes = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-mistakes, axis=None, kind="stable")[: PAIRS if len(matrix) <= MATRIX_CLASSES else MORE_PAIRS]
    places = [divmod(int(at), len(matrix)) for at in order]
    return [(i, j) for i, j in places if mistakes[i, j]]


def matrix_rows(matrix: np.ndarray, classes: Sequence[str], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the table of confusions: a row per true class, a cell per predicted one."""
    shares = row_shares(matrix)
    links = {(cell.target, cell.label): cell.id for cell in cells}
    rows = []
    for i, name in enumerate(classes):
        row = []
        for j, (count, share) in enumerate(zip(matrix[i].tolist(), shares[i].tolist(), strict=True)):
            kind = " none" if not count else " same" if i == j else " strong" if share > 0.25 else ""
            heat = share if i == j else charts.heat(share)
            text = f"{share:.0%}" if share >= 0.01 or not count else "<1%"
            row.append({"count": count, "share": text, "heat": f"{heat:.3f}", "kind": kind, "link": links.get((i, j))})
        rows.append({"name": name, "total": int(matrix[i].sum()), "cells": row})
    return rows


def row_shares(matrix: np.ndarray) -> np.ndarray:
    """Return each count of a matrix ``(C, C)`` as a share of its row; 0 where the row is empty."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def choose_cells(matrix: np.ndarray, predictions: pd.DataFrame, classes: Sequence[str], budget: int) -> list[Cell]:
    """Return the cells that are shown with pictures, the most frequent mistakes first, and ``budget`` images of them.

    A cell has its most confident mistakes or its least confident hits; where the budget is short, the fullest cells
    have fewer. Of more classes than a table holds it is the commonest confusions alone.

    Args:
        predictions: ``target``, ``label`` and ``confidence`` of each test image.
    """
    count = len(classes)
    if count <= MATRIX_CLASSES:
        filled = [divmod(int(at), count) for at in np.argsort(-matrix, axis=None, kind="stable")]
        places = sorted((at for at in filled if matrix[at]), key=lambda at: at[0] == at[1])
    else:
        places = confused_pairs(matrix)
    places = places[:budget]
    wanted = np.array([min(matrix[i, j], HITS if i == j else MISTAKES) for i, j in places], int)
    most = max((k for k in range(1, MISTAKES + 1) if np.minimum(wanted, k).sum() <= budget), default=0)
    shown = np.minimum(wanted, most)
    shown[np.flatnonzero(shown < wanted)[: budget - shown.sum()]] += 1
    index = pd.Index(classes)
    pair = index.get_indexer(predictions["target"]) * count + index.get_indexer(predictions["label"])
    confidence = predictions["confidence"].to_numpy(np.float64)
    correct = pair % (count + 1) == 0
    order = np.lexsort((np.where(correct, confidence, -confidence), pair))
    starts = np.searchsorted(pair[order], [i * count + j for i, j in places])
    return [
        Cell(i, j, int(matrix[i, j]), order[start : start + number].tolist())
        for (i, j), start, number in zip(places, starts, shown.tolist(), strict=True)
    ]


def tile_edge(images: np.ndarray) -> int:
    """Return the edge of a picture behind a cell, for images ``(N, H, W, 3)``."""
    return min(EDGE, max(images.shape[1:3]))


def sheet(images: np.ndarray, indexes: Sequence[int], edge: int) -> str:
    """Return some of uint8 RGB images ``(N, H, W, 3)``, in rows of ``COLUMNS``, as one picture in a data URI."""
    size = (min(COLUMNS, len(indexes)) * edge, math.ceil(len(indexes) / COLUMNS) * edge)
    whole = Image.new("RGB", size)
    for place, index in enumerate(indexes):
        tile = Image.fromarray(np.ascontiguousarray(images[index])).resize((edge, edge), Image.Resampling.BOX)
        whole.paste(tile, (place % COLUMNS * edge, place // COLUMNS * edge))
    return data_uri(whole, "webp", quality=80, lossless=whole.width * whole.height <= LOSSLESS_PIXELS)


def cell_values(cells: Sequence[Cell], predictions: pd.DataFrame, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each cell its words and its pictures: where they stand in the sheet, and what was said of them."""
    values, place = [], 0
    for cell in cells:
        target, label, tiles = classes[cell.target], classes[cell.label], []
        for row in predictions.iloc[list(cell.images)].to_dict("records"):
            words = f"test image {row['index']}" + (f": {row['name']}" if "name" in row else "")
            said = f"{label} {row['confidence']:.1%}"
            said += "" if cell.target == cell.label else f", {target} {row[f'p_{cell.target}']:.1%}"
            tile = {"x": place % COLUMNS, "y": place // COLUMNS, "title": f"{words}; {said}"}
            tiles.append({**tile, "confidence": row["confidence"]})
            place += 1
        values.append({"id": cell.id, "target": target, "label": label, "count": cell.count, "tiles": tiles})
    return values
