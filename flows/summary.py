"""One night in words and figures: markdown for Prefect's UI, a few lines for the terminal."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.champion import Judgement
from tasks.judge import LEVEL, Metrics, chance_words, images_words

if TYPE_CHECKING:
    from rich.console import Console

#: Key in metrics.json, label, and whether it is a share that reads best in percent.
FIGURES = (
    ("accuracy", "accuracy", True),
    ("top5_error", "top-5 error", True),
    ("log_loss", "log loss", False),
    ("calibration_error", "calibration error", True),
)


@dataclass(frozen=True)
class StageRun:
    """How one stage of the graph went: Prefect's state name, its message, and the time it took."""

    name: str
    state: str
    message: str
    seconds: float


@dataclass(frozen=True)
class Predictions:
    """The classified folder in words; ``table`` is None if there was nothing to classify."""

    note: str
    table: str | None = None
    facts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Night:
    """All that one retraining did. Paths are relative to the workspace."""

    run: str
    judgement: Judgement
    champion: str | None
    stages: list[StageRun]
    predictions: Predictions
    report: str
    logs: str
    seconds: float

    @property
    def headline(self) -> str:
        verdict = self.judgement.verdict
        word = "promoted" if verdict.action == "promote" else "held"
        return f"{word}: {'; '.join(verdict.reasons)}"


def duration(seconds: float) -> str:
    """Return ``seconds`` the way people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def figure(metrics: Metrics | None, key: str, percent: bool) -> str:
    """Return one metric as text; a dash where it is missing."""
    value = metrics.get(key) if metrics else None
    if value is None:
        return "–"
    return f"{value:.2%}" if percent else f"{value:.4f}"


def markdown(night: Night) -> str:
    """Return the night as a markdown page."""
    challenger, champion = night.judgement.challenger, night.judgement.champion
    lines = [
        f"# {night.headline[0].upper()}{night.headline[1:]}",
        "",
        f"Run {night.run}, {duration(night.seconds)}. In service: {_code(night.champion)}.",
        "",
        f"| on {challenger.get('test_images', '?')} test images | challenger | champion until now |",
        "| --- | ---: | ---: |",
        f"| model | {_code(challenger['model_id'])} | {_code(champion['model_id'] if champion else None)} |",
    ]
    for key, label, percent in FIGURES:
        lines.append(f"| {label} | {figure(challenger, key, percent)} | {figure(champion, key, percent)} |")
    lines += _judged(night.judgement.verdict.comparison)
    lines += ["", "| stage | state | time | |", "| --- | --- | ---: | --- |"]
    for stage in night.stages:
        lines.append(f"| {stage.name} | {stage.state} | {duration(stage.seconds)} | {_cell(stage.message)} |")
    lines += ["", f"Predictions: {night.predictions.note}.", ""]
    if night.predictions.facts:
        lines += ["| status | files |", "| --- | ---: |"]
        lines += [f"| {_cell(status)} | {count:,} |" for status, count in night.predictions.facts["statuses"].items()]
        lines += ["", "| label | files |", "| --- | ---: |"]
        lines += [f"| {_cell(name)} | {count:,} |" for name, count in night.predictions.facts["labels"].items()]
        lines += [""]
    if night.predictions.table:
        lines.append(f"- table: `{night.predictions.table}`")
    lines += [f"- report: `{night.report}`", f"- logs: `{night.logs}`"]
    return "\n".join(lines) + "\n"


def _judged(comparison: dict[str, Any] | None) -> list[str]:
    """Return the table of what the judge found between the two models; nothing where nothing was compared."""
    if comparison is None:
        return []
    rows = [("accuracy", f"{comparison['gain'] * 100:+.2f} points")]
    if "unpaired" in comparison:
        rows.append(("image by image", f"not compared: {comparison['unpaired']}"))
    else:
        low, high = (f"{bound * 100:+.2f}" for bound in comparison["interval"])
        rows.append((f"{LEVEL * 100:.0f} % interval", f"{low} to {high} points"))
        rows.append(("image by image", f"{images_words(comparison)}; {chance_words(comparison['p'])}"))
        worst = [_class_words(entry) for entry in comparison["classes"]]
        rows.append(("recall lost", "; ".join(worst) or "by no class"))
    if "calibration_change" in comparison:
        rows.append(("calibration error", f"{comparison['calibration_change'] * 100:+.2f} points"))
    return [
        "",
        "| challenger against champion | |",
        "| --- | --- |",
        *(f"| {label} | {words} |" for label, words in rows),
    ]


def _class_words(entry: dict[str, Any]) -> str:
    counts = f"{entry['now_right']:,} now right, {entry['now_wrong']:,} now wrong of {entry['images']:,}"
    words = f"{_cell(entry['name'])} {entry['change'] * 100:+.2f} points ({counts}; {chance_words(entry['p'])})"
    return f"**{words}**" if entry["lost"] else words


def print_night(night: Night, console: "Console") -> None:
    """Print what a person wants to know in the morning."""
    from rich.text import Text

    challenger, champion = night.judgement.challenger, night.judgement.champion
    promoted = night.judgement.verdict.action == "promote"
    accuracy = f"{figure(challenger, 'accuracy', True)} on {challenger.get('test_images', '?')} test images"
    if champion and champion["model_id"] != challenger["model_id"]:
        accuracy += f", the champion's was {figure(champion, 'accuracy', True)}"
    rows = [
        ("verdict", Text(night.headline, style="green" if promoted else "yellow")),
        ("accuracy", Text(accuracy)),
        ("in service", Text(night.champion or "no model yet")),
        ("predictions", Text(night.predictions.table or night.predictions.note)),
        ("report", Text(night.report)),
    ]
    console.print()
    for label, text in rows:
        # Not wrapped: paths are there to be copied.
        console.print(Text.assemble((f"{label:<13}", "bold"), text), soft_wrap=True)


def _code(text: str | None) -> str:
    return f"`{text}`" if text else "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
