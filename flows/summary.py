"""One night in words and figures: markdown for Prefect's UI, a few lines for the terminal."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from flows.champion import Judgement
from flows.changes import Changes
from flows.notify import State
from flows.stages import Outcome
from tasks.judge import LEVEL, Metrics, chance_words, images_words

if TYPE_CHECKING:
    from rich.console import Console

    from flows.publish import Published
    from tasks.inbox import Intake

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


@dataclass
class Night:
    """All that is known of one retraining, filled in while it goes on. Paths are relative to the workspace.

    Attributes:
        judgement: None until there is one, as all that a night may end before.
        champion: id of the model in service, at the end.
        stopped: how it ended if not with a verdict, and ``reason`` why, in one line.
        mended: what killed runs had left and was put right at the start, a line each.
        next_run: None if none is planned.
        changes: see ``flows.changes.changes``.
        page: the HTML page about it.
    """

    run: str
    judgement: Judgement | None = None
    champion: str | None = None
    stages: list[StageRun] = field(default_factory=list)
    predictions: Predictions | None = None
    report: str = ""
    logs: str = ""
    seconds: float = 0.0
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    stopped: State | None = None
    reason: str = ""
    mended: list[str] = field(default_factory=list)
    intake: "Intake | None" = None
    published: "Published | None" = None
    next_run: datetime | None = None
    changes: Changes | None = None
    page: str = ""

    @property
    def state(self) -> State:
        """How it ended; a night that neither built anything nor found another model is ``unchanged``."""
        if self.stopped or self.judgement is None:
            return self.stopped or "interrupted"
        if self.judgement.verdict.action == "promote":
            return "promoted"
        met = self.judgement.champion
        same = met is not None and met["model_id"] == self.judgement.challenger["model_id"]
        return "unchanged" if same or not self.built else "held"

    @property
    def promoted(self) -> bool:
        """Whether the challenger is in service, however the night went on."""
        judged = self.judgement
        return (
            judged is not None and judged.verdict.action == "promote" and self.champion == judged.challenger["model_id"]
        )

    @property
    def drift(self) -> dict[str, Any]:
        """How unlike the validated images the classified ones are: a level, and sentences; both empty if not at all."""
        found = ((self.predictions.facts or {}) if self.predictions else {}).get("drift") or {}
        return {"level": found.get("level", ""), "sentences": found.get("sentences", [])}

    @property
    def built(self) -> bool:
        """Whether any stage had something to do, be it only to take its outputs out of DVC's run cache."""
        return any(stage.message != Outcome.unchanged for stage in self.stages)

    @property
    def headline(self) -> str:
        """How it ended and why, in one line."""
        if self.stopped or self.judgement is None:
            return f"{self.state}: {self.reason}"
        verdict = self.judgement.verdict
        word = "promoted" if verdict.action == "promote" else "held"
        return f"{word}: {'; '.join(verdict.reasons)}"


def duration(seconds: float) -> str:
    """Return ``seconds`` the way people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(time: datetime) -> str:
    """Return a time with its day and zone the way people write it."""
    return f"{time:%A}, {time.day} {time:%B %Y, %H:%M %Z}"


def figure(metrics: Metrics | None, key: str, percent: bool) -> str:
    """Return one metric as text; a dash where it is missing."""
    value = metrics.get(key) if metrics else None
    if value is None:
        return "–"
    return f"{value:.2%}" if percent else f"{value:.4f}"


def markdown(night: Night) -> str:
    """Return the night as a markdown page."""
    lines = [
        f"# {night.headline[0].upper()}{night.headline[1:]}",
        "",
        f"Run {night.run}, {duration(night.seconds)}. In service: {_code(night.champion)}.",
    ]
    if night.judgement:
        lines += _figures(night.judgement)
    lines += _told(night)
    if night.stages:
        lines += ["", "| stage | state | time | |", "| --- | --- | ---: | --- |"]
        for stage in night.stages:
            lines.append(f"| {stage.name} | {stage.state} | {duration(stage.seconds)} | {_cell(stage.message)} |")
    if night.predictions:
        lines += ["", f"Predictions: {night.predictions.note}.", ""]
        lines += [*(f"- {sentence}" for sentence in night.drift["sentences"]), ""] if night.drift["sentences"] else []
        if night.predictions.facts:
            lines += ["| status | files |", "| --- | ---: |"]
            lines += [
                f"| {_cell(status)} | {count:,} |" for status, count in night.predictions.facts["statuses"].items()
            ]
            lines += ["", "| label | files |", "| --- | ---: |"]
            lines += [f"| {_cell(name)} | {count:,} |" for name, count in night.predictions.facts["labels"].items()]
    table = night.predictions.table if night.predictions else None
    places = {"page of the night": night.page, "table": table, "report": night.report, "logs": night.logs}
    lines += ["", *(f"- {label}: `{place}`" for label, place in places.items() if place)]
    return "\n".join(lines) + "\n"


def _figures(judgement: Judgement) -> list[str]:
    challenger, champion = judgement.challenger, judgement.champion
    lines = [
        "",
        f"| on {challenger.get('test_images', '?')} test images | challenger | champion until now |",
        "| --- | ---: | ---: |",
        f"| model | {_code(challenger['model_id'])} | {_code(champion['model_id'] if champion else None)} |",
    ]
    for key, label, percent in FIGURES:
        lines.append(f"| {label} | {figure(challenger, key, percent)} | {figure(champion, key, percent)} |")
    return lines + _judged(judgement.verdict.comparison)


def _told(night: Night) -> list[str]:
    """Return what came in, what changed, what was published and when the next run is, a paragraph each."""
    came = night.intake is not None and any(vars(night.intake).values())
    told = [("Before it", "; ".join(night.mended))] if night.mended else []
    told += [("Inbox", " ".join(night.intake.sentences()))] if came else []
    if night.changes:
        changes = [
            f"{change.key} {change.before or 'default'} → {change.after or 'default'}"
            for change in night.changes.parameters
        ]
        told += [("Data", " ".join(night.changes.data)), ("Parameters", "; ".join(changes) or "the champion's")]
    if night.published:
        told.append(("Published", "; ".join([night.published.sentence, *night.published.notes])))
    if night.next_run:
        told.append(("Next run", moment(night.next_run)))
    return [line for label, words in told for line in ("", f"{label}: {' '.join(words.split())}")]


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

    rows = [("verdict", Text(night.headline, style="green" if night.state == "promoted" else "yellow"))]
    if night.judgement:
        challenger, champion = night.judgement.challenger, night.judgement.champion
        accuracy = f"{figure(challenger, 'accuracy', True)} on {challenger.get('test_images', '?')} test images"
        if champion and champion["model_id"] != challenger["model_id"]:
            accuracy += f", the champion's was {figure(champion, 'accuracy', True)}"
        rows.append(("accuracy", Text(accuracy)))
    rows.append(("in service", Text(night.champion or "no model yet")))
    if night.predictions:
        rows.append(("predictions", Text(night.predictions.table or night.predictions.note)))
    rows += [(label, Text(place)) for label, place in (("report", night.report), ("page", night.page)) if place]
    console.print()
    for label, text in rows:
        # Not wrapped: paths are there to be copied.
        console.print(Text.assemble((f"{label:<13}", "bold"), text), soft_wrap=True)


def _code(text: str | None) -> str:
    return f"`{text}`" if text else "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
