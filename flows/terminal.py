"""What commands print for people: label and value, line by line."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from tasks.outcome import PredictSummary


def screen() -> "Console":
    """Return rich's console on standard output as it is now."""
    from rich.console import Console

    return Console()


def print_pairs(target: "Console", pairs: dict[str, str]) -> None:
    """Print a line for each label and its value."""
    from rich.text import Text

    for label, value in pairs.items():
        # Not wrapped: paths are there to be copied.
        target.print(Text.assemble((f"{label:<13}", "bold"), value), soft_wrap=True)


def print_prediction(summary: "PredictSummary", shown: Callable[[Path], str]) -> None:
    """Print what happened to a prediction's files; ``shown`` says how a path is written."""
    counts, local = summary.counts, "://" not in summary.out
    statuses = ", ".join(f"{count:,} {status}" for status, count in counts.statuses.most_common())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in summary.left_out.items())
    resumed = f", {summary.resumed_files:,} of them before" if summary.resumed_files else ""
    pairs = {
        "files": f"{counts.files:,} ({statuses}) in {summary.seconds:.1f} s{resumed}",
        "left out": left_out,
        "changed": f"{summary.changed_files:,} files since this run was planned: --fresh takes them in"
        if summary.changed_files
        else "",
        "accepted": f"{counts.accepted:,} with a confidence of {summary.threshold:.3f} or more",
        "model": f"{summary.model_id}, {summary.engine}: {summary.engine_reason}",
        "drift": " ".join((summary.drift or {}).get("sentences", [])),
        "predictions": shown(Path(summary.table).resolve()) if local else summary.table,
        "sorted": summary.sorted or "",
        "report": shown(Path(summary.report).resolve()) if summary.report and local else summary.report or "",
    }
    print_pairs(screen(), {label: value for label, value in pairs.items() if value})
