"""The card that goes with a registered model: Markdown in the usual headings, every word of it from the model's files.

The headings are those of Mitchell et al., "Model Cards for Model Reporting", 2019 (arXiv 1810.03993), as far as a
bundle and its evaluation can fill them. What they do not hold is left out: the card states no purpose, no license and
no source of the data.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tasks.bundle import Bundle
from tasks.choice import evidence
from tasks.judge import Metrics, hollow_figures
from tasks.pages import counted, percent, rows_of
from tasks.tally import Tally

CARD = "card.md"
#: Classes that a table lists, the worst first.
LISTED = 50
#: Worst classes that the limits name.
WORST = 3
#: The evaluation's figures: key, name, whether it is a share. Those that an older evaluation lacks are left out.
FIGURES = (
    ("accuracy", "accuracy (top-1)", True),
    ("top1_error", "top-1 error", True),
    ("top5_error", "top-5 error", True),
    ("macro_f1", "macro F1", True),
    ("log_loss", "log loss", False),
    ("calibration_error", "calibration error", True),
    ("accepted", "accepted answers", True),
    ("accepted_accuracy", "accuracy among them", True),
)
#: Characters that mean something to Markdown in the middle of a line, in a table's cell, or to GitHub ($).
SPECIAL = re.compile(r"([\\`*_\[\]<>|~&#$])")


def render_card(bundle: Bundle, metrics: Metrics) -> str:
    """Return the card; ``metrics`` is the content of the evaluation's metrics.json."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escaped,
    )
    environment.filters.update(percent=percent, counted=counted, code=code)
    model, tested = bundle.parameters.get("model", {}), metrics.get("engines", {})
    classes = [{"name": name, **facts} for name, facts in metrics["per_class"].items() if facts.get("images")]
    return environment.get_template("modelcard.md").render(
        bundle=bundle,
        metrics=metrics,
        model=model,
        upsampled=bundle.decode.size * 2 ** model.get("doublings", 0),
        figures=_figures(metrics),
        engines=[_engine(name, {**bundle.engines.get(name, {}), **found}) for name, found in tested.items()],
        level=metrics.get("confidence_level"),
        worst=sorted(classes, key=lambda facts: facts["recall"]),
        listed=LISTED,
        named=WORST,
        training=rows_of(bundle.training),
        refused=[(name, evidence(bundle, name)) for name, facts in bundle.engines.items() if not facts.get("offered")],
        normalization=rows_of(bundle.normalization),
        decoding=rows_of(bundle.decode.model_dump(mode="json")),
        reference=Tally.load(bundle.reference_file).count if bundle.reference_file.is_file() else 0,
        parameters=Block(yaml.safe_dump(bundle.parameters, sort_keys=False, allow_unicode=True)),
    )


class Code(str):
    """Text that is Markdown already."""


class Block(Code):
    """Lines that stand indented, as they are."""

    def __new__(cls, text: str) -> "Block":
        return super().__new__(cls, "\n".join(f"    {line}" for line in text.splitlines()))


def escaped(value: Any) -> str:
    """Return a value as text that Markdown shows as it is, on one line."""
    if isinstance(value, Code):
        return value
    return SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def code(value: str) -> Code:
    """Return a digest, id or path as code; it holds no backtick."""
    return Code(f"`{value}`")


def _figures(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Return name, value and interval of each figure that was measured and says something."""
    intervals, hollow = {**metrics.get("intervals", {})}, hollow_figures(metrics)
    if "accuracy_low" in metrics:
        intervals["accuracy"] = metrics["accuracy_low"], metrics["accuracy_high"]
    rows = []
    for key, name, share in FIGURES:
        if key in metrics and key not in hollow:
            write = (lambda value: percent(value, 2)) if share else "{:.4f}".format
            interval = " to ".join(map(write, intervals[key])) if key in intervals else ""
            rows.append((name, write(metrics[key]), interval))
    return rows


def _engine(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return an engine's name, accuracy, agreement, whether it is offered, and speed, empty where not known."""
    shares = [percent(found[key], 2) if key in found else "" for key in ("accuracy", "agreement")]
    speed = f"{found['images_per_second']:,.1f}" if "images_per_second" in found else ""
    return name, *shares, "yes" if found.get("offered") else "no", speed
