"""The augmentation for people: in words, and as a sheet of images before and after."""

import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tasks.augmentation import AugmentParams

#: Images are enlarged by whole factors to at least the first and shrunk to at most the second, in pixels.
TILE = (64, 112)


def describe(params: AugmentParams) -> str:
    """Return the augmentation in words, for the preview's subtitle."""
    words = []
    if params.flip_horizontal or params.flip_vertical:
        ways = {"horizontal": params.flip_horizontal, "vertical": params.flip_vertical}
        words.append("flip " + " and ".join(way for way, used in ways.items() if used))
    if params.shift_pixels:
        fill = {"edge": "repeated", "reflect": "mirrored", "constant": "black"}[params.shift_fill]
        words.append(f"shift up to {params.shift_pixels} px, {fill} edge")
    if params.eraser.p:
        eraser, kind = params.eraser, "noise" if params.eraser.pixel_level else "gray"
        area = f"{eraser.s_l:.0%} to {eraser.s_h:.0%} of the area"
        words.append(f"erase {eraser.p:.0%} of the images, {area}, {kind}")
    return "  ·  ".join(words) or "no augmentation: training sees the images as they are"


def draw_preview(path: Path, rows: list[tuple[str, np.ndarray, np.ndarray]], title: str, subtitle: str) -> None:
    """Write a PNG sheet with one row per class: the name, the original, then the draws.

    Args:
        rows: class name, original uint8 (H, W, 3), draws uint8 (D, H, W, 3).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gap, apart, margin, header = 6, 26, 24, 92
    tiles = [[_tile(image) for image in (original, *draws)] for _, original, draws in rows]
    height, width = tiles[0][0].shape[:2]
    names = [_shortened(name) for name, _, _ in rows]
    left = margin + 12 + max(24, max(int(8.2 * len(name)) for name in names))
    columns = [left] + [left + width + apart + i * (width + gap) for i in range(len(tiles[0]) - 1)]
    size = (max(columns[-1] + width + margin, 640), header + len(rows) * (height + gap) - gap + margin)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    sheet = np.full((size[1], size[0], 3), 255, np.uint8)
    ink, soft = "#1d2733", "#6b7785"

    def write(x: float, y: float, text: str, points: float, color: str, **style: Any) -> None:
        # Class names are people's own words: a dollar sign starts no formula.
        figure.text(x / size[0], 1 - y / size[1], text, size=points, color=color, parse_math=False, **style)

    for index, (name, row) in enumerate(zip(names, tiles, strict=True)):
        top = header + index * (height + gap)
        for column, tile in zip(columns, row, strict=True):
            sheet[top : top + height, column : column + width] = tile
        write(left - 12, top + height / 2, name, 9.5, ink, ha="right", va="center_baseline")
    figure.figimage(sheet, origin="upper", resize=False)
    write(margin, 32, title, 13, ink, weight="bold", va="baseline")
    write(margin, 53, subtitle, 9, soft, va="baseline")
    write(columns[0], header - 9, "original", 8, soft, va="baseline")
    write(columns[1], header - 9, "as training sees it", 8, soft, va="baseline")
    with warnings.catch_warnings():
        # A class named in a script that the font lacks is drawn as boxes; that is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # No date and no version: the same pixels give the same file.
        canvas.print_png(path, metadata={"Software": None})


def _tile(image: np.ndarray) -> np.ndarray:
    """Enlarge by a whole factor, so that every pixel stays a square; shrink what is larger than a tile."""
    least, most = TILE
    longest = max(image.shape[:2])
    if longest > most:
        height, width = (max(1, round(edge * most / longest)) for edge in image.shape[:2])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    factor = -(-least // longest)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
