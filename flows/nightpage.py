"""The HTML page of a night that has ended. No Prefect in here.

A page is for whoever opens it in the morning or a year later: it has all figures in itself, loads nothing, and its
links lead to files beside it. It lies in ``.nightly/nights``, as the logs do: it is about runs on this very machine,
and neither git nor DVC has to carry it along.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from natsort import natsorted

from flows.changes import facts, folder_of
from flows.notify import Record
from flows.summary import Night, StageRun, duration, moment
from flows.workspace import Workspace
from tasks import charts, pages
from tasks.files import read_json, write_text
from tasks.judge import FIGURES, LEVEL, chance_words, hollow_figures, images_words

#: Beyond this a list is cut, and the page says so.
CLASSES, PARAMETERS, LABELS, NIGHTS, LOG_LINES = 20, 60, 20, 10, 20
_LOG_BYTES = 16_384

_BADGES = {
    "promoted": "Promoted",
    "held": "Held",
    "unchanged": "Nothing new",
    "skipped": "Skipped",
    "interrupted": "Interrupted",
    "failed": "Failed",
    "killed": "Killed",
}


def write_night_page(destination: Path, workspace: Workspace, night: Night, records: Sequence[Record] = ()) -> None:
    """Write one self-contained HTML page about a night that has ended.

    Args:
        records: the nights on record, this one included, oldest first.
    """
    values = _Page(workspace, night, destination.parent).values()
    last = [(record, (destination.parent / f"{record.run}.html").is_file()) for record in reversed(records[-NIGHTS:])]
    filters = {"duration": duration, "moment": moment}
    page = pages.render(
        "night.html", folders=[Path(__file__).with_name("templates")], filters=filters, last=last, **values
    )
    write_text(destination, page)


@dataclass(frozen=True)
class _Page:
    """What the template shows; ``folder`` is where its links start."""

    workspace: Workspace
    night: Night
    folder: Path

    def values(self) -> dict[str, Any]:
        night = self.night
        judged = night.judgement
        reasons = list(judged.verdict.reasons) if judged and not night.stopped else [night.reason]
        if night.stopped and night.promoted:
            reasons.append(f"before that, {night.champion} was promoted: {'; '.join(judged.verdict.reasons)}")
        return {
            "night": night,
            "badge": _BADGES[night.state],
            "title": self.title,
            "reasons": reasons,
            "next_step": self.next_step(),
            "failed_stage": self.failed_stage,
            "log_tail": self.log_tail(),
            "log_link": self.link(self.log) if self.log else None,
            "challenger": judged.challenger if judged else None,
            "champion": self.met,
            "first": judged is not None and judged.champion is None,
            "figures": self.figures(),
            "comparison": self.comparison(),
            "recalls": self.recalls(),
            "curves": self.curves(),
            "training": facts(self.workspace, judged.challenger["model_id"]).get("training", {}) if judged else {},
            "stages": self.stages(),
            "drift": night.drift,
            "labels": self.labels(),
            "links": self.links(),
            "classes_shown": CLASSES,
            "parameters_shown": PARAMETERS,
        }

    @property
    def met(self) -> Mapping[str, Any] | None:
        """The figures of the champion, if the challenger is another model."""
        judged = self.night.judgement
        if judged and judged.champion and judged.champion["model_id"] != judged.challenger["model_id"]:
            return judged.champion
        return None

    @property
    def title(self) -> str:
        night, stays = self.night, f"{self.night.champion} stays in service" if self.night.champion else ""
        challenger = night.judgement.challenger["model_id"] if night.judgement else None
        titles = {
            "promoted": f"Model {challenger} is in service now",
            "held": f"Model {challenger} was held",
            "unchanged": "Nothing new",
            "skipped": "This run was skipped",
            "interrupted": "Interrupted: the next run goes on",
            "failed": f"Failed at {self.failed_stage}" if self.failed_stage else "Failed",
        }
        title = titles[night.state]
        return f"{title}, {stays}" if stays and night.state in ("held", "unchanged") else title

    @cached_property
    def failed_stage(self) -> str | None:
        """The stage, or the step beside the stages that has a log, at which the night ended."""
        if self.night.state != "failed":
            return None
        said = self.night.reason.partition(":")[0]  # how a supervised child's failure begins
        last = self.night.stages[-1] if self.night.stages else None
        if last and last.state not in ("Completed", "Cached"):
            return last.name
        return said if self._log_of(said).is_file() else None

    @property
    def log(self) -> Path | None:
        path = self._log_of(self.failed_stage or "")
        return path if path.is_file() else None

    def _log_of(self, stage: str) -> Path:
        return self.workspace.root / (self.night.logs or ".") / f"{stage}.log"

    def log_tail(self) -> str:
        if not self.log:
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _LOG_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        return "\n".join(line[:400] for line in lines[-LOG_LINES:])

    def next_step(self) -> list[str]:
        """Return what comes after a night that did not end as planned."""
        night = self.night
        serving = f"{night.champion} is in service." if night.champion else "No model is in service yet."
        start = f"The next run, on {moment(night.next_run)}," if night.next_run else "The next run"
        if night.state == "failed":
            again = f"{start} starts again with {self.failed_stage}" if self.failed_stage else f"{start} starts again"
            return [
                serving,
                f"{again}; stages that were done before it are kept.",
                "What failed for the data or the parameters will fail again until these are mended.",
            ]
        if night.state == "interrupted":
            return [serving, f"What was done is saved; {start[0].lower()}{start[1:]} goes on from there."]
        if night.state == "skipped":
            return [serving, f"Nothing was touched. {start} will look again."]
        return []

    def figures(self) -> list[dict[str, Any]]:
        """Return the rows of both models' figures side by side."""
        judged = self.night.judgement
        if not judged:
            return []
        sides = [_telling(judged.challenger), _telling(self.met or {})]
        rows = []
        for key, label, share, more_is_better in FIGURES:
            new, old = (side.get(key) for side in sides)
            if (new is None and old is None) or key == "top1_error":  # which says what accuracy says
                continue
            change = round(new - old, 9) if new is not None and old is not None else None
            rows.append(
                {
                    "key": key,
                    "label": label,
                    "new": _figure(new, share),
                    "value": new,
                    "old": _figure(old, share),
                    "change": "–" if change is None else _signed(change, share),
                    "unit": "points" if change and share else "",
                    "better": (change > 0) == more_is_better if change and more_is_better is not None else None,
                }
            )
        return rows

    def comparison(self) -> dict[str, Any] | None:
        """Return what the judge found between the two models, in words, with a chart of the gain."""
        found = (self.night.judgement.verdict.comparison if self.night.judgement else None) or {}
        if not self.met or "gain" not in found:
            return None
        rows, chart = [("Accuracy", _points(found["gain"]))], ""
        if "interval" in found:
            low, high = found["interval"]
            rows.append((f"{LEVEL * 100:.0f}% interval", f"{low * 100:+z.2f} to {high * 100:+z.2f} points"))
            chart = _gain_chart(found["gain"], low, high)
        if "now_right" in found and "p" in found:
            rows.append(("Image by image", f"{images_words(found)}; McNemar's exact test: {chance_words(found['p'])}"))
        if "unpaired" in found:
            rows.append(("Image by image", f"not compared: {found['unpaired']}"))
        if "calibration_change" in found:
            rows.append(("Calibration error", _points(found["calibration_change"])))
        return {"rows": rows, "chart": chart}

    def recalls(self) -> list[dict[str, Any]]:
        """Return the classes whose recall differs between the two models, the largest difference first."""
        if not self.met:
            return []
        new, old = self.night.judgement.challenger.get("per_class", {}), self.met.get("per_class", {})
        rows = []
        for name in natsorted({*new, *old}):
            pair = [side.get(name, {}).get("recall") for side in (new, old)]
            if pair[0] != pair[1]:
                change = round(pair[0] - pair[1], 9) if None not in pair else 0.0
                images = (new.get(name) or old.get(name)).get("images")
                rows.append({"name": name, "new": pair[0], "old": pair[1], "change": change, "images": images})
        return sorted(rows, key=lambda row: (row["change"] > 0, -abs(row["change"])))

    def curves(self) -> list[tuple[str, Markup]]:
        """Return title and chart of the challenger's loss and accuracy over its training."""
        judged = self.night.judgement
        folder = folder_of(self.workspace, judged.challenger["model_id"]) if judged else None
        if not folder or not (folder / "history.csv").is_file():
            return []
        with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
            history = list(csv.DictReader(file))
        kept = read_json(folder / "bundle.json").get("training", {}).get("kept_epoch")
        drawn = []
        for title, key, words in (("Loss", "loss", "{:g}".format), ("Accuracy", "accuracy", charts.round_percent)):
            lines = [
                charts.Series(name, _points_of(history, column), tone)
                for name, column, tone in (("training", key, "ink"), ("validation", f"val_{key}", "accent"))
            ]
            if chart := charts.line_chart(lines, f"{title} over epochs", words, kept):
                drawn.append((title, chart))
        return drawn

    def stages(self) -> list[dict[str, Any]]:
        """Return the stages as bars on one axis of time."""
        runs: list[StageRun] = self.night.stages
        whole = sum(run.seconds for run in runs) or 1.0
        rows, start = [], 0.0
        for run in runs:
            log = self._log_of(run.name)
            rows.append(
                {
                    "run": run,
                    "start": min(start / whole * 100, 99.4),
                    "width": max(run.seconds / whole * 100, 0.6),
                    "kind": "bad"
                    if run.state not in ("Completed", "Cached")
                    else ""
                    if run.state == "Completed"
                    else "quiet",
                    "log": self.link(log) if self.night.logs and log.is_file() else None,
                }
            )
            start += run.seconds
        return rows

    def labels(self) -> list[tuple[str, int, float]]:
        """Return the most frequent labels, their files, and these as a share of the most frequent's."""
        found = ((self.night.predictions.facts or {}) if self.night.predictions else {}).get("labels", {})
        most = max(found.values(), default=0) or 1
        return [
            (name, files, files / most) for name, files in sorted(found.items(), key=lambda item: -item[1])[:LABELS]
        ]

    def links(self) -> list[tuple[str, str]]:
        """Return name and address of what there is to look at."""
        night, space = self.night, self.workspace
        wanted = []
        if night.judgement:
            # In the registry it stays what it is; the stage's own is overwritten by the next model's.
            kept = space.registry / night.judgement.challenger["model_id"] / "evaluation" / "report.html"
            wanted.append(("Evaluation report", kept if kept.is_file() else space.evaluation / "report.html"))
        if night.predictions and night.predictions.table and "://" not in night.predictions.table:
            gallery = (space.root / night.predictions.table).with_name("report.html")
            wanted.append(("Gallery of the predictions", gallery))
        if night.changes:
            wanted.append(("Data card", space.root / "data" / "card.html"))
        if night.logs:
            wanted.append(("Logs", space.root / night.logs))
        return [(name, self.link(path)) for name, path in wanted if path.exists()]

    def link(self, path: Path) -> str:
        return quote(os.path.relpath(path, self.folder))


def _telling(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a model that say something of it."""
    hollow = hollow_figures(metrics)
    return {key: value for key, value in metrics.items() if key not in hollow}


def _signed(change: float, share: bool) -> str:
    return "none" if not change else f"{change * 100:+z.2f}" if share else f"{change:+.4f}"


def _points(change: float) -> str:
    return f"{_signed(change, True)} points" if change else "none"


def _figure(value: float | None, share: bool) -> str:
    return "–" if value is None else pages.percent(value, 2) if share else f"{value:.4f}"


def _points_of(history: list[dict[str, str]], column: str) -> list[tuple[float, float]]:
    return [(float(row["epoch"]), float(row[column])) for row in history if row.get(column)]


def _gain_chart(gain: float, low: float, high: float) -> Markup:
    """Draw the difference in accuracy with its interval, and where no difference is."""
    marks = charts.ticks(min(low, 0.0), max(high, 0.0), 4)
    plane = charts.Plane((marks[0], marks[-1]), (0, 1), 62, left=24, right=24)
    plane.line((marks[0], 0.5), (marks[-1], 0.5), "grid")
    plane.rectangle((low, max(high, low + 1e-9)), (0, 1), "accent fill", f"{low:+.2%} to {high:+.2%}")
    plane.line((0, 0), (0, 1), "ink dashed")
    plane.add('<circle cx="{x}" cy="{y}" r="5" class="accent"/>', x=plane.x(gain), y=plane.y(0.5))
    for mark in marks:
        plane.text(plane.x(mark), 48, f"{mark * 100:+.4g}" if mark else "0")
    return plane.svg(f"Gain {gain:+.2%}, interval {low:+.2%} to {high:+.2%}")
