"""Whether a challenger replaces the champion: both models on the same frozen test images, pair by pair.

An image that only one of the two gets right is *discordant*: ``now_right`` counts those that the challenger wins,
``now_wrong`` those that it loses. All that follows rests on these two counts, over all images or over a class's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tasks.errors import NightlyError
from tasks.files import read_json
from tasks.params import Section

Metrics = dict[str, Any]
Share = Annotated[float, Field(ge=0, le=1)]

#: Level of the interval round the difference in accuracy, and what it is drawn with.
LEVEL, RESAMPLES, SEED = 0.95, 10_000, 0
#: How often, at most, chance alone may hold a challenger for losing a class when it is as good in every one.
CLASS_CHANCE = 0.05
#: Classes that are written down, the worst first.
WORST_CLASSES = 5
#: The engine whose difference from Keras in float32 is no matter of precision.
EXACT = "openvino-float32"
#: Key in metrics.json, name, whether it is a share, and whether more of it is better, if either is.
FIGURES = (
    ("accuracy", "Accuracy", True, True),
    ("top1_error", "Top-1 error", True, False),
    ("top5_error", "Top-5 error", True, False),
    ("macro_f1", "Macro F1", True, True),
    ("log_loss", "Log loss", False, False),
    ("calibration_error", "Calibration error", True, False),
    ("accepted", "Accepted", True, None),
    ("accepted_accuracy", "Right among the accepted", True, True),
)


class JudgeParams(Section):
    """What a challenger must show to go into service.

    Attributes:
        minimum_gain: accuracy on the frozen test set that it must win by, 0..1.
        accuracy_floor: accuracy under which no model goes into service, the first one included.
        significance: p of McNemar's test must be below it; null: a gain is enough.
        class_recall_tolerance: recall, 0..1, that a class may lose. A class that lost more holds the challenger only
            if chance does not explain it; so a class of few images never does by one of them.
        calibration_tolerance: by how much the expected calibration error, 0..1, may grow.
    """

    minimum_gain: Share = 0.001
    accuracy_floor: Share = 0.5
    significance: Annotated[float | None, Field(gt=0, lt=1)] = None
    class_recall_tolerance: Share = 0.05
    calibration_tolerance: Share = 0.05


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A model as its evaluation shows it.

    Attributes:
        metrics: the content of ``metrics.json``.
        targets: true class of each test image by name ``(N,)``; None where the predictions are missing.
        correct: whether the model got it right ``(N,)``, bool; None likewise.
        offered: the engines that the model is to classify with, by what was found on the validation split.
    """

    metrics: Metrics
    targets: NDArray[np.object_] | None = None
    correct: NDArray[np.bool_] | None = None
    offered: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.metrics["model_id"]


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger goes into service, why in words, and what ``compare`` found, if there was a champion."""

    action: Literal["promote", "hold"]
    reasons: list[str]
    comparison: dict[str, Any] | None = None


def read_metrics(evaluation: Path) -> Metrics:
    """Return ``metrics.json`` of an evaluation directory."""
    path = evaluation / "metrics.json"
    if not path.is_file():
        raise NightlyError(f"{path} is missing: run 'nightly retrain' to evaluate the model")
    return read_json(path)


def read_evaluation(evaluation: Path, offered: tuple[str, ...] = ()) -> Evaluated:
    """Return what an evaluation directory says of its model; one of an older version may lack the predictions."""
    metrics, path = read_metrics(evaluation), evaluation / "predictions.parquet"
    if not path.is_file():
        return Evaluated(metrics, offered=offered)
    import pyarrow.parquet as parquet  # not for those who only read the ledger

    table = parquet.read_table(path, columns=["target", "correct"])
    return Evaluated(metrics, table["target"].to_numpy(), table["correct"].to_numpy(), offered)


def hollow_figures(metrics: Metrics) -> set[str]:
    """Return the figures that say nothing of the model, because they are the same of any other.

    Those are the accuracy among the accepted answers if there are none, and the top-5 error of five classes or fewer.
    """
    same = {
        "accepted_accuracy": metrics.get("accepted") == 0,
        "top5_error": 1 <= len(metrics.get("per_class", ())) <= 5,
    }
    return {name for name, hollow in same.items() if hollow}


def judge(challenger: Evaluated, champion: Evaluated | None, rules: JudgeParams) -> Verdict:
    """Decide whether ``challenger`` replaces ``champion``, the model in service; None if it would be the first."""
    if champion is not None and champion.id == challenger.id:
        return Verdict("hold", [f"{challenger.id} is the champion already"])
    accuracy = challenger.metrics["accuracy"]
    obstacles = []
    if accuracy < rules.accuracy_floor:
        obstacles.append(f"accuracy {accuracy:.2%} is under the floor of {rules.accuracy_floor:.2%}")
    obstacles += _failed_engines(challenger)
    if champion is None:
        first = f"the first model, and its accuracy of {accuracy:.2%} is over the floor"
        return Verdict("hold", obstacles) if obstacles else Verdict("promote", [first])
    if obstacle := incomparable(challenger.metrics, champion.metrics):
        by_hand = f"if it is the one you want, put it in service by hand with 'nightly promote {challenger.id}'"
        return Verdict("hold", [*obstacles, obstacle, by_hand])
    found = compare(challenger, champion, rules.class_recall_tolerance)
    better, accuracy_words = _accuracy(found, rules)
    obstacles += [] if better else [accuracy_words]
    obstacles += _lost_classes(found, rules) + _worse_calibration(challenger.metrics, champion.metrics, rules)
    reasons = obstacles or [accuracy_words]
    if better and obstacles:
        reasons.append(f"otherwise {accuracy_words}")
    if "unpaired" in found:
        reasons.append(f"compared by their accuracies alone: {found['unpaired']}")
    return Verdict("hold" if obstacles else "promote", reasons, found)


def incomparable(challenger: Metrics, champion: Metrics) -> str | None:
    """Return why the two accuracies may not be compared, or None if they may."""
    new, old = set(challenger["per_class"]), set(champion["per_class"])
    if new != old:
        changes = [f"{sign}{name}" for sign, names in (("+", new - old), ("-", old - new)) for name in sorted(names)]
        return f"its classes differ from the champion's ({', '.join(changes)}), so the two can't be compared"
    if challenger["test_digest"] != champion["test_digest"]:
        return "the champion was measured on another test set, so the two can't be compared"
    return None


def compare(challenger: Evaluated, champion: Evaluated, class_recall_tolerance: float) -> dict[str, Any]:
    """Return in JSON values how two models differ that were measured on the same test set.

    - ``gain``: the challenger's accuracy less the champion's, and ``calibration_change`` the same of the calibration
      errors if both are known;
    - ``test_images``, ``now_right``, ``now_wrong``; ``p`` of ``mcnemar``; ``interval`` of ``bootstrap_interval``;
    - ``classes``: the worst of those that lost recall, see ``class_changes``.

    Without the predictions of both there is ``unpaired``, the reason in words, in place of the last two lines.
    """
    new, old = challenger.metrics, champion.metrics
    # Rounded, because 0.938 - 0.937 is a little less than 0.001 in binary.
    found: dict[str, Any] = {"gain": round(new["accuracy"] - old["accuracy"], 9)}
    if "calibration_error" in new and "calibration_error" in old:
        found["calibration_change"] = round(new["calibration_error"] - old["calibration_error"], 9)
    if reason := _unpaired(challenger, champion):
        return {**found, "unpaired": reason}
    images = len(challenger.correct)
    now_right = int((challenger.correct & ~champion.correct).sum())
    now_wrong = int((champion.correct & ~challenger.correct).sum())
    low, high = bootstrap_interval(now_right, now_wrong, images)
    return {
        **found,
        "gain": round((now_right - now_wrong) / images, 9),
        "test_images": images,
        "now_right": now_right,
        "now_wrong": now_wrong,
        "p": _short(mcnemar(now_right, now_wrong)),
        "interval": [round(low, 6), round(high, 6)],
        "classes": class_changes(challenger, champion, class_recall_tolerance)[:WORST_CLASSES],
    }


def mcnemar(now_right: int, now_wrong: int) -> float:
    """Return the exact two-sided p: how often equally good models differ by as much or more.

    McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages", 1947, with
    the binomial distribution itself in place of the chi-squared approximation, which is poor under 25 pairs.
    """
    from scipy.stats import binomtest  # half a second that a look at the ledger need not wait

    discordant = now_right + now_wrong
    return float(binomtest(now_right, discordant, 0.5).pvalue) if discordant else 1.0


def bootstrap_interval(now_right: int, now_wrong: int, images: int) -> tuple[float, float]:
    """Return the paired percentile interval of the difference in accuracy at ``LEVEL``.

    Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979. Images drawn with replacement have each kind in
    multinomial counts, so the counts are drawn instead of the images: the same resamples, at no cost.
    """
    kinds = np.array([now_right, now_wrong, images - now_right - now_wrong])
    drawn = np.random.default_rng(SEED).multinomial(images, kinds / images, size=RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / images, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def class_changes(challenger: Evaluated, champion: Evaluated, tolerance: float) -> list[dict[str, Any]]:
    """Return the classes that lost recall as JSON values, the worst first.

    Each has its ``name``, its ``change`` of recall, ``images``, ``now_right``, ``now_wrong``, and ``p``: how often a
    class that is as well recognized as before loses as many of its discordant images (McNemar, exact, one-sided).
    It is ``lost`` if its recall fell by more than ``tolerance`` and ``p`` is under ``CLASS_CHANCE`` divided by the
    number of classes (Bonferroni), so that the more classes there are to look at, the less a bad one by chance counts.
    """
    from scipy.stats import binom

    names, place = np.unique(challenger.targets, return_inverse=True)
    images = np.bincount(place)
    now_right = np.bincount(place[challenger.correct & ~champion.correct], minlength=len(names))
    now_wrong = np.bincount(place[champion.correct & ~challenger.correct], minlength=len(names))
    p = binom.cdf(now_right, now_right + now_wrong, 0.5)
    change = np.round((now_right - now_wrong) / images, 9)
    lost = (-change > tolerance) & (p < CLASS_CHANCE / len(names))
    return [
        {
            "name": str(names[i]),
            "change": round(float(change[i]), 6),
            "images": int(images[i]),
            "now_right": int(now_right[i]),
            "now_wrong": int(now_wrong[i]),
            "p": _short(p[i]),
            "lost": bool(lost[i]),
        }
        for i in np.lexsort((change, ~lost))
        if change[i] < 0
    ]


def chance_words(p: float) -> str:
    """Return a p value as text."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def images_words(figures: dict[str, Any]) -> str:
    """Return the two discordant counts as text."""
    right, wrong = figures["now_right"], figures["now_wrong"]
    return f"{right:,} image{'' if right == 1 else 's'} now right, {wrong:,} now wrong"


def _unpaired(challenger: Evaluated, champion: Evaluated) -> str | None:
    for model, name in ((champion, "the champion's"), (challenger, "the challenger's")):
        if model.correct is None:
            return f"{name} predictions are missing"
    if not np.array_equal(challenger.targets, champion.targets):
        return "their predictions are of different images"
    return None


def _accuracy(found: dict[str, Any], rules: JudgeParams) -> tuple[bool, str]:
    """Return whether the challenger is better by as much as it must be, and the difference in words."""
    gain = found["gain"]
    difference, details = f"{abs(gain) * 100:.2f} points", ""
    if "p" in found:
        low, high = sorted(-bound if gain < 0 else bound for bound in found["interval"])
        interval = f"{LEVEL * 100:.0f} % interval {low * 100:z.2f} to {high * 100:z.2f}"
        details = f" ({interval}; {images_words(found)}; {chance_words(found['p'])})"
    if gain == 0:
        return False, f"as good as the champion on the frozen test set, and no better{details}"
    if gain < 0:
        return False, f"worse than the champion on the frozen test set by {difference}{details}"
    wanted = [] if gain >= rules.minimum_gain else [f"{rules.minimum_gain * 100:.2f} points are wanted"]
    if rules.significance is not None:
        if "p" not in found:
            wanted.append(f"without predictions there is no p, and it must be below {rules.significance:g}")
        elif found["p"] >= rules.significance:
            wanted.append(f"p must be below {rules.significance:g}")
    better = f"better than the champion on the frozen test set by {difference}"
    return not wanted, "; ".join([f"{better} only{details}", *wanted]) if wanted else f"{better}{details}"


def _lost_classes(found: dict[str, Any], rules: JudgeParams) -> list[str]:
    allowed = f"{rules.class_recall_tolerance * 100:.2f} points are allowed, and chance does not explain it"
    return [
        f"recall of '{entry['name']}' fell by {-entry['change'] * 100:.2f} points "
        f"({images_words(entry)}; {chance_words(entry['p'])}): {allowed}"
        for entry in found.get("classes", [])
        if entry["lost"]
    ]


def _worse_calibration(challenger: Metrics, champion: Metrics, rules: JudgeParams) -> list[str]:
    if "calibration_error" not in challenger or "calibration_error" not in champion:
        return []
    new, old = challenger["calibration_error"], champion["calibration_error"]
    if round(new - old, 9) <= rules.calibration_tolerance:
        return []
    allowed = f"{rules.calibration_tolerance * 100:.2f} points more are allowed"
    return [f"its calibration error is {new:.2%} where the champion's is {old:.2%}: {allowed}"]


def _failed_engines(challenger: Evaluated) -> list[str]:
    """Return what is wrong with the engines that compute in float32 as Keras does: no rounding excuses those.

    A faster precision that fails on the test split is not offered, but no reason to keep a better model out.
    """
    found = challenger.metrics.get("engines", {})
    return [
        f"engine {name} was to be offered and failed on the test split: same label as Keras on "
        f"{found[name]['agreement']:.2%} of the images, {found[name]['accuracy_lost'] * 100:.2f} points lost"
        for name in challenger.offered
        if name == EXACT and not found.get(name, {}).get("passed", True)
    ]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
