"""How a prediction is asked for, and what is told of it in the end."""

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from tasks.errors import NightlyError
from tasks.params import Section
from tasks.store import PARTS
from tasks.tables import Counts


class PredictParams(Section):
    """How images are classified.

    Attributes:
        engine: auto is Keras where a GPU is present, else OpenVINO.
        precision: auto is the fastest that agreed with Keras and that this processor has.
        top_k: labels per image, with their probabilities.
        all_probabilities: of every class, in place of ``top_k``.
        threshold: smallest confidence that is ``accepted``; null takes the bundle's.
        include: only files like these, patterns as in .gitignore.
        exclude: no files like these.
        formats: what is written; Parquet always is.
        report: write report.html, a gallery to look at.
        strict: the command fails in the end if any file fails; the result is written all the same.
        max_failed: it fails in the end if more files fail, such as ``20`` or ``2%``.
        shard_files: files in one part, which is what a rerun goes on with and what a worker of a cluster takes.
        batch_size: images per inference batch of Keras; null leaves it to the engine, as OpenVINO's always is.
    """

    engine: Literal["auto", "keras", "openvino"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    top_k: int = Field(3, ge=1)
    all_probabilities: bool = False
    threshold: float | None = Field(None, ge=0, le=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: tuple[Literal["parquet", "csv", "jsonl"], ...] = ("parquet", "csv")
    report: bool = False
    strict: bool = False
    max_failed: str | None = Field(None, pattern=r"^\d+(\.\d+)?%?$", coerce_numbers_to_str=True)
    shard_files: int = Field(2000, ge=1, le=100_000)
    batch_size: int | None = Field(None, ge=1, le=4096)

    def allowed_failures(self, files: int) -> float | None:
        """Return how many of ``files`` may fail; None if all may."""
        if self.strict:
            return 0
        if self.max_failed is None:
            return None
        number = float(self.max_failed.rstrip("%"))
        return files * number / 100 if self.max_failed.endswith("%") else number


@dataclass
class PredictSummary:
    """What happened to a folder, as ``summary.json`` keeps it.

    Attributes:
        seconds: of this run; a run that goes on with another's counts its own.
        first_image_seconds: until the first row was known.
        resumed_files: rows that were there already.
        sorted: what was put into folders, in words.
    """

    source: str
    out: str
    model_id: str
    engine: str
    engine_reason: str
    threshold: float
    temperature: float
    counts: Counts = field(default_factory=Counts)
    left_out: dict[str, int] = field(default_factory=dict)
    changed_files: int = 0
    resumed_files: int = 0
    drift: dict[str, Any] | None = None
    report: str | None = None
    sorted: str | None = None
    seconds: float = 0.0
    first_image_seconds: float | None = None

    @property
    def table(self) -> str:
        return f"{self.out}/{PARTS}"

    def facts(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        fresh = self.counts.files - self.resumed_files
        return {
            "source": self.source,
            "model_id": self.model_id,
            "engine": self.engine,
            "engine_reason": self.engine_reason,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "files": self.counts.files,
            "bytes": self.counts.bytes,
            "failed": self.counts.failed,
            "left_out": self.left_out,
            "changed_since_planned": self.changed_files,
            "statuses": dict(self.counts.statuses.most_common()),
            "labels": dict(self.counts.labels.most_common()),
            "accepted": self.counts.accepted,
            "drift": self.drift,
            "resumed_files": self.resumed_files,
            "seconds": round(self.seconds, 3),
            "first_image_seconds": self.first_image_seconds and round(self.first_image_seconds, 3),
            "images_per_second": round(fresh / self.seconds, 1) if fresh and self.seconds else None,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


class TooManyFailed(NightlyError):
    """More files failed than ``strict`` or ``max_failed`` allow; the result, ``summary``, is complete all the same."""

    def __init__(self, message: str, summary: PredictSummary) -> None:
        super().__init__(message)
        self.summary = summary
