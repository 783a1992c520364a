import io
import re
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.confusions import COLUMNS, HITS, MISTAKES, cell_values, choose_cells, confused_pairs, sheet, tile_edge
from tasks.metrics import confusion_matrix

CLASSES = ["a", "b", "c"]


def predicted(pairs, classes=CLASSES):
    """Return the matrix and the rows of (target, label, confidence), all classes by index."""
    targets, labels, confidence = (np.array(column) for column in zip(*pairs, strict=True))
    names = np.array(classes, dtype=object)
    columns = {"index": range(len(pairs)), "target": names[targets], "label": names[labels], "confidence": confidence}
    columns |= {f"p_{i}": np.where(labels == i, confidence, 0.125) for i in range(len(classes))}
    return confusion_matrix(targets, labels, len(classes)), pd.DataFrame(columns)


PAIRS = [(0, 0, 0.9), (0, 1, 0.5), (0, 1, 0.75), (2, 2, 0.6), (2, 2, 0.5), (2, 0, 0.5), (0, 1, 0.625)]


def test_mistakes_come_first_the_most_confident_ahead_and_hits_the_least_confident():
    cells = choose_cells(*predicted(PAIRS), CLASSES, 100)
    assert [(cell.target, cell.label, cell.count, cell.images) for cell in cells] == [
        (0, 1, 3, [2, 6, 1]),
        (2, 0, 1, [5]),
        (2, 2, 2, [4, 3]),
        (0, 0, 1, [0]),
    ]


@pytest.mark.parametrize(
    ("budget", "shown"), [(100, [3, 1, 2, 1]), (6, [2, 1, 2, 1]), (5, [2, 1, 1, 1]), (4, [1, 1, 1, 1]), (2, [1, 1])]
)
def test_a_short_budget_takes_from_the_fullest_cells_first(budget, shown):
    assert [len(cell.images) for cell in choose_cells(*predicted(PAIRS), CLASSES, budget)] == shown


def test_a_cell_shows_a_limited_number():
    pairs = [(0, 1, 0.5 + i / 1000) for i in range(60)] + [(1, 1, 0.5 + i / 1000) for i in range(60)]
    mistakes, hits = choose_cells(*predicted(pairs), CLASSES, 1000)
    assert mistakes.images == list(range(59, 59 - MISTAKES, -1))
    assert hits.images == list(range(60, 60 + HITS))
    assert mistakes.count == hits.count == 60


def test_of_many_classes_the_commonest_confusions_have_pictures():
    classes = [f"c{i}" for i in range(100)]
    pairs = [(i, (i + 1) % 100, 0.5) for i in range(100)] + [(7, 8, 0.6), (3, 3, 0.9)]
    matrix, predictions = predicted(pairs, classes)
    cells = choose_cells(matrix, predictions, classes, 1000)
    assert [(cell.target, cell.label) for cell in cells] == confused_pairs(matrix)
    assert cells[0].images == [100, 7]
    assert len(cells) == 24


def test_without_mistakes_there_are_hits_and_without_images_nothing():
    matrix, predictions = predicted([(0, 0, 0.9)])
    assert [cell.id for cell in choose_cells(matrix, predictions, CLASSES, 10)] == ["cell-0-0"]
    assert choose_cells(matrix * 0, predictions[:0], CLASSES, 10) == []


def test_each_picture_stands_in_the_sheet_where_its_tile_says():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (100, 8, 8, 3), np.uint8)
    pairs = [(0, 1, 0.9)] * 30 + [(1, 2, 0.8)] * 30 + [(2, 2, 0.7)] * 40
    matrix, predictions = predicted(pairs)
    cells = choose_cells(matrix, predictions, CLASSES, 1000)
    indexes = [index for cell in cells for index in cell.images]
    assert len(indexes) > COLUMNS
    whole = np.asarray(Image.open(io.BytesIO(b64decode(sheet(images, indexes, 8).partition(",")[2]))))
    for value, cell in zip(cell_values(cells, predictions, CLASSES), cells, strict=True):
        for tile, index in zip(value["tiles"], cell.images, strict=True):
            place = whole[8 * tile["y"] : 8 * tile["y"] + 8, 8 * tile["x"] : 8 * tile["x"] + 8]
            np.testing.assert_array_equal(place, images[index])
            assert re.match(rf"test image {index};", tile["title"])


def test_a_tile_says_what_the_model_said():
    matrix, predictions = predicted(PAIRS)
    predictions["name"] = [f"{i}.png" for i in range(len(PAIRS))]
    first, *_, last = cell_values(choose_cells(matrix, predictions, CLASSES, 100), predictions, CLASSES)
    assert first["tiles"][0]["title"] == "test image 2: 2.png; b 75.0%, a 12.5%"
    assert first["tiles"][0]["confidence"] == 0.75
    assert last["tiles"][0]["title"] == "test image 0: 0.png; a 90.0%"


def test_photographs_are_shrunk():
    images = np.full((1, 256, 256, 3), 200, np.uint8)
    assert tile_edge(images) == 48
    picture = np.asarray(Image.open(io.BytesIO(b64decode(sheet(images, [0], 48).partition(",")[2]))))
    assert picture.shape == (48, 48, 3)
    np.testing.assert_array_equal(picture, 200)
