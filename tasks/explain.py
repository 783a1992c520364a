"""Show why a model says what it says: each picture with its heat map, as a page, a PNG sheet and JSON."""

import argparse
import contextlib
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from tasks.bundle import Bundle, load_bundle, load_keras_model
from tasks.choice import choose_engine
from tasks.device import prepare_device
from tasks.engines import open_engine
from tasks.errors import NightlyError, run_main
from tasks.files import publish_file, write_json, write_text
from tasks.heat import GradCam, colors, overlay
from tasks.images import DecodePolicy
from tasks.inputs import open_input
from tasks.outcome import PredictParams
from tasks.pages import data_uri, percent, pixelated, render
from tasks.params import nearest, read_section
from tasks.predict import locate
from tasks.prediction import how_to_answer
from tasks.rows import GROUP, Part, Seen, look_ahead, printable

PAGE, SHEET, FACTS = "explain.html", "explain.png", "explain.json"
#: Pictures explained unless asked otherwise: a page of about 10 MB.
LIMIT = 100
#: Edge of a picture on the page and the sheet, pixels.
EDGE = 160


@dataclass(frozen=True)
class Explained:
    """A picture as the model sees it, what the model says of it, and what speaks for class ``explained``.

    Attributes:
        row: the columns of a prediction's table, with the probability of every class, the highest first.
        pixels: uint8 (H, W, 3).
        heat: float32 (H, W), see ``tasks.heat``.
    """

    row: dict[str, Any]
    explained: str
    pixels: np.ndarray
    heat: np.ndarray

    @property
    def answers(self) -> dict[str, float]:
        """The probability of every class, the highest first."""
        return dict(zip(self.row["labels"], self.row["probabilities"], strict=True))

    def shown(self, top_k: int) -> list[tuple[str, float]]:
        """Return the first ``top_k`` answers, and the explained class if it is not among them."""
        ranked = list(self.answers.items())
        return ranked[:top_k] + [answer for answer in ranked[top_k:] if answer[0] == self.explained]


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found.

    Attributes:
        failed: rows of the files that have no picture, as in a prediction's table.
        left_out: files beyond the limit.
        layer: name of the layer whose feature map the heat is from, ``cells`` its height and width.
    """

    bundle: Bundle
    engine: str
    top_k: int
    pictures: list[Explained]
    failed: list[dict[str, Any]]
    left_out: int
    layer: str
    cells: tuple[int, int]

    def facts(self) -> dict[str, Any]:
        """Return the explanation as plain JSON values."""
        return {
            "model_id": self.bundle.id,
            "engine": self.engine,
            "temperature": self.bundle.temperature,
            "layer": self.layer,
            "cells": list(self.cells),
            "left_out": self.left_out,
            "statuses": Counter([*("ok" for _ in self.pictures), *(row["status"] for row in self.failed)]),
            "files": [
                {
                    "path": picture.row["path"],
                    "label": picture.row["label"],
                    "confidence": picture.row["confidence"],
                    "accepted": picture.row["accepted"],
                    "explained": picture.explained,
                    "evidence": bool(picture.heat.any()),
                    "probabilities": dict(picture.shown(self.top_k)),
                }
                for picture in self.pictures
            ],
            "failed": [{name: row[name] for name in ("path", "status", "reason")} for row in self.failed],
        }


def explain(
    sources: Sequence[str],
    out: Path,
    model: Path,
    params: PredictParams,
    *,
    wanted: str | None = None,
    limit: int = LIMIT,
) -> Explanation:
    """Explain the pictures of ``sources`` and write ``explain.html``, ``explain.png`` and ``explain.json``.

    Labels and probabilities are those that ``tasks.predict`` gives with the same parameters, by the same engine; the
    heat comes from Keras in float32, which has gradients.

    Args:
        sources: as in ``tasks.predict``; their files in order.
        out: a directory; other files in it stay.
        model: a bundle's directory.
        wanted: the class to explain; None: of each picture the one that the model says.
        limit: pictures at most, the first ones.

    Raises:
        NightlyError: no such class, bundle or engine, nothing there, or not one file is a picture.
    """
    bundle = load_bundle(model)
    if wanted is not None and wanted not in bundle.classes:
        raise NightlyError(f"--class '{wanted}' is none of model {bundle.id}'s, {nearest(wanted, bundle.classes)}")
    engine, _ = choose_engine(bundle, params.engine, params.precision)
    answering = how_to_answer(bundle, params.changed(all_probabilities=True))
    found, left_out = _look(sources, bundle.decode, params, limit)
    part = Part(answering)
    images = [pixels for _, pixels in found if pixels is not None]
    if not images:
        seen = found[0][0]
        others = f", and {len(found) - 1:,} more like it" if len(found) > 1 else ""
        raise NightlyError(f"there is no picture to explain: {printable(seen.path)} is {seen.status}{others}")
    probabilities = iter(open_engine(bundle, engine, batch_size=params.batch_size).probabilities(np.stack(images)))
    for seen, pixels in found:
        part.add(seen, None if pixels is None else next(probabilities), None)
    rows = part.table().to_pylist()
    good = [row for row in rows if row["status"] == "ok"]
    explained = [wanted or row["label"] for row in good]
    prepare_device()
    gradcam = GradCam(load_keras_model(bundle))
    heat = gradcam.heat(np.stack(images), [bundle.classes.index(name) for name in explained])
    explanation = Explanation(
        bundle=bundle,
        engine=engine,
        top_k=params.top_k,
        pictures=[Explained(*of) for of in zip(good, explained, images, heat, strict=True)],
        failed=[row for row in rows if row["status"] != "ok"],
        left_out=left_out,
        layer=gradcam.layer,
        cells=gradcam.cells,
    )
    write_text(out / PAGE, render_page(explanation))
    with publish_file(out / SHEET) as file:
        draw_sheet(file, explanation.pictures, explanation.top_k)
    write_json(out / FACTS, explanation.facts())
    return explanation


def render_page(explanation: Explanation) -> str:
    """Return the explanation as one HTML page."""
    pictures = explanation.pictures
    return render(
        "explain.html",
        pictures=[
            {
                "path": picture.row["path"],
                "label": picture.row["label"],
                "explained": picture.explained,
                "probability": picture.answers[picture.explained],
                "evidence": bool(picture.heat.any()),
                "accepted": picture.row["accepted"],
                "answers": picture.shown(explanation.top_k),
                "views": [
                    (name, data_uri(Image.fromarray(view)))
                    for name, view in zip(("picture", "heat", "both"), views(picture, EDGE), strict=True)
                ],
            }
            for picture in pictures
        ],
        failed=explanation.failed,
        left_out=explanation.left_out,
        model_id=explanation.bundle.id,
        engine=explanation.engine,
        size=explanation.bundle.decode.size,
        layer=explanation.layer,
        cells=explanation.cells,
        pixelated=pixelated([picture.pixels for picture in pictures]),
    )


def views(picture: Explained, edge: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the picture, its heat and both together, each uint8 (edge, edge, 3)."""
    enlarged = pixelated([picture.pixels])
    pixels = cv2.resize(picture.pixels, (edge, edge), interpolation=cv2.INTER_NEAREST if enlarged else cv2.INTER_AREA)
    heat = cv2.resize(picture.heat, (edge, edge), interpolation=cv2.INTER_LINEAR)
    return pixels, colors(heat), overlay(pixels, heat)


def draw_sheet(path: Path, pictures: Sequence[Explained], top_k: int) -> None:
    """Write a PNG sheet: of each picture the three views, its name and its answers as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    margin, gap, words, line = 24, 6, 250, 17
    width, height = 3 * (EDGE + gap) + 12 + words, max(EDGE, 40 + line * (top_k + 1)) + 22
    columns = 1 if len(pictures) < 4 else 2
    rows = -(-len(pictures) // columns)
    size = (margin + columns * (width + margin), margin + rows * height)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    sheet = np.full((size[1], size[0], 3), 255, np.uint8)
    ink, soft, accent, track = "#1d2733", "#6b7785", (23, 92, 125), (232, 232, 228)

    def write(x: float, y: float, text: str, color: str, **style: Any) -> None:
        # Names are people's own words: a dollar sign starts no formula.
        style = {"size": 8.5, "va": "baseline", "parse_math": False} | style
        figure.text(x / size[0], 1 - y / size[1], text, color=color, **style)

    for index, picture in enumerate(pictures):
        # Down the first column, then down the second.
        column, row = divmod(index, rows)
        left, top = margin + column * (width + margin), margin + row * height
        for place, view in enumerate(views(picture, EDGE)):
            x = left + place * (EDGE + gap)
            sheet[top : top + EDGE, x : x + EDGE] = view
        x = left + 3 * (EDGE + gap) + 12
        write(x, top + 11, _shortened(picture.row["path"], 38), soft, size=7.5)
        why = f"{picture.explained}, {percent(picture.answers[picture.explained], 1)}"
        write(x, top + 31, _shortened(why, 28), ink, size=10.5, weight="bold")
        for number, (name, share) in enumerate(picture.shown(top_k)):
            y = top + 54 + line * number
            write(x, y, _shortened(name, 14), ink if name == picture.explained else soft)
            sheet[y - 6 : y - 2, x + 100 : x + 200] = track
            sheet[y - 6 : y - 2, x + 100 : x + 100 + round(100 * share)] = accent
            write(x + words, y, percent(share, 1), soft, ha="right")
        if not picture.heat.any():
            write(x, top + EDGE - 3, "nothing in it speaks for this class", soft, size=7.5)
    figure.figimage(sheet, origin="upper", resize=False)
    with warnings.catch_warnings():
        # A class named in a script that the font lacks is drawn as boxes; that is no reason to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.print_png(path, metadata={"Software": None})


def _shortened(text: str, length: int) -> str:
    """Keep the end of a long text, which tells files apart."""
    return text if len(text) <= length else "…" + text[1 - length :]


def _look(
    sources: Sequence[str], policy: DecodePolicy, params: PredictParams, limit: int
) -> tuple[list[tuple[Seen, np.ndarray | None]], int]:
    """Return the first ``limit`` files as ``tasks.rows.look`` does, and how many there are beyond."""
    found: list[tuple[Seen, np.ndarray | None]] = []
    beyond = 0
    for source in sources:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nightly-")))
            files = stack.enter_context(contextlib.closing(open_input(locate(source), scratch)))
            paths = files.find(params.include, params.exclude).paths
            chosen = paths[: limit - len(found)]
            beyond += len(paths) - len(chosen)
            for seen, pixels in look_ahead(files, policy, chosen, GROUP):
                # Of several sources two may hold files of the same name.
                name = source if files.kind == "file" else os.path.join(source, seen.path)
                found.append((seen if len(sources) == 1 else replace(seen, path=name), pixels))
    if not found:
        raise NightlyError(f"{', '.join(map(repr, sources))} holds no images")
    return found, beyond


def main() -> None:
    parser = argparse.ArgumentParser(description=explain.__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--class", dest="wanted", help="explain this class, whatever the model says")
    args = parser.parse_args()
    params = read_section(args.params, "predict", PredictParams)
    explanation = explain(args.sources, args.out, args.model, params, wanted=args.wanted)
    print(f"explained {len(explanation.pictures):,} pictures: {os.path.join(args.out, PAGE)}")


if __name__ == "__main__":
    run_main(main)
