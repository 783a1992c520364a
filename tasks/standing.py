"""How far a training run has come, and what it ends with."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasks.checkpoint import State

#: The columns of ``history.csv``. ``seconds`` are those of training alone, without validation and checkpoints.
HISTORY_COLUMNS = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds")


@dataclass
class Standing:
    """How far a run has come; all of it goes into each checkpoint.

    ``step`` counts optimizer steps within the epoch, ``seconds`` the training time spent on it so far.
    ``micro_batches`` is how many parts a batch is computed in, more than one after running out of memory.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    micro_batches: int = 1
    best_epoch: int = 0
    best_loss: float = float("inf")
    best_weights: list[np.ndarray] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def of(cls, state: State) -> "Standing":
        facts = {name: value for name, value in state.facts.items() if not name.startswith("_")}
        facts["rows"] = list(facts["rows"])
        if facts["best_loss"] is None:  # JSON has no infinity
            facts["best_loss"] = float("inf")
        return cls(**facts, best_weights=numbered(state.arrays, "best"))

    def facts(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("epoch", "step", "seconds", "micro_batches", "best_epoch")}
        return {**kept, "rows": list(self.rows), "best_loss": self.best_loss if self.best_epoch else None}


@dataclass(frozen=True)
class Outcome:
    """The history, and the classifier's weights of the epoch that is kept."""

    rows: list[dict[str, float]]
    kept: dict[str, float]
    weights: list[np.ndarray]
    micro_batches: int


def where(standing: Standing, steps_per_epoch: int) -> str:
    """Return a position in words."""
    if standing.step == 0 and standing.epoch:
        return f"epoch {standing.epoch}"
    return f"epoch {standing.epoch + 1}, step {standing.step} of {steps_per_epoch}"


def numbered(arrays: dict[str, np.ndarray], group: str) -> list[np.ndarray]:
    """Return the arrays ``group:0``, ``group:1``, … in that order."""
    chosen = [name for name in arrays if name.startswith(f"{group}:")]
    return [arrays[name] for name in sorted(chosen, key=lambda name: int(name.partition(":")[2]))]
