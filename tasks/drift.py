"""Whether the images of a folder look like those the model was validated on, and in plain words where they do not.

Four views: the images themselves, the network's features, the classes predicted and the confidence. Each has an
effect size that does not depend on the number of images, and a noise allowance that does: what chance alone exceeds
about once in a thousand folders. A view matters if its effect is beyond both the allowance and a threshold.

The allowance takes images for independent draws. Frames of one film or a burst of one scene are fewer than they
count, and pass for drift sooner. Both sides have to come from one model, one decode policy and one engine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.tally import CONFIDENCE_BINS, LOOKS, SMALLEST_STD, STATISTICS, Tally

#: Below this the normal approximation behind the allowances is poor, and little short of a flood would be seen.
MINIMUM_IMAGES = 30
#: Two-sided, one in a thousand: there are about ten comparisons, so a false alarm in at most one folder of a hundred.
CHANCE = 0.001
Z = 3.29
#: Effects that are "some" and "strong" drift. Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988,
#: section 2.2: 0.5 standard deviations are visible to the naked eye, 0.8 are large; 0.2 would name any two folders.
STANDARDIZED = (0.5, 0.8)
#: Total variation, the share of labels that moved. By Pinsker's inequality a population stability index is at least
#: four times its square, so 0.25 implies the index of 0.25 that counts as a major shift (Lewis, "An Introduction to
#: Credit Scoring", 1994), and 0.5 an index of 1.
SHARES = (0.25, 0.5)
#: The fall of mean confidence estimates the fall of accuracy, rather too low than too high (Guillory et al.,
#: "Predicting with Confidence on Unseen Distributions", 2021): one image in twenty, one in ten more are wrong.
CONFIDENCE = (0.05, 0.1)
#: A mean saturation below this is gray to the eye; gray images have exactly 0.
GRAY = 0.01

_LEVELS = ("none", "some", "strong")
_PHRASES = {
    "brightness": ("The images are darker", "The images are brighter", "mean brightness"),
    "contrast": ("The images have less contrast", "The images have more contrast", "mean standard deviation"),
    "saturation": ("The colors are weaker", "The colors are stronger", "mean saturation"),
    "red": ("The colors lean toward cyan", "The colors lean toward red", "share of red"),
    "green": ("The colors lean toward magenta", "The colors lean toward green", "share of green"),
    "blue": ("The colors lean toward yellow", "The colors lean toward blue", "share of blue"),
}


@dataclass(frozen=True)
class View:
    """One way to look at the difference.

    Args:
        effect: its size, whatever the number of images.
        noise: the effect that chance alone exceeds about once in a thousand folders of this size.
        level: "none", "some" or "strong".
        details: plain JSON values.
    """

    effect: float
    noise: float
    level: str
    details: dict[str, Any]


@dataclass(frozen=True)
class DriftReport:
    """How far a folder is from the reference.

    Attributes:
        level: the strongest of the views' levels; "none" if there are too few images to tell.
        sentences: for people; empty where nothing matters.
        views: by name: ``images``, ``features``, ``classes``, ``confidence``; none if there are too few images, no
            ``features`` if a side has none.
    """

    images: int
    reference_images: int
    level: str
    sentences: list[str]
    views: dict[str, View]

    @property
    def enough(self) -> bool:
        """Whether there were images enough to tell."""
        return min(self.images, self.reference_images) >= MINIMUM_IMAGES

    def facts(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "level": self.level,
            "enough": self.enough,
            "images": self.images,
            "reference_images": self.reference_images,
            "sentences": self.sentences,
            "views": {name: _rounded(vars(view)) for name, view in self.views.items()},
        }


def compare(reference: Tally, seen: Tally, classes: Sequence[str]) -> DriftReport:
    """Compare a folder's tally with the one of the validation split."""
    for tally in (reference, seen):
        if tally.count and len(tally.labels) != len(classes):
            raise ValueError(f"{len(classes)} classes, but a tally of {len(tally.labels)}")
    for images, tally in (("images", seen), ("validation images", reference)):
        if tally.count < MINIMUM_IMAGES:
            which = f"Too few {images} to tell whether the folder looks like training"
            sentence = f"{which}: {tally.count}, and it takes {MINIMUM_IMAGES}."
            return DriftReport(seen.count, reference.count, "none", [sentence], {})
    found = {
        "images": _compare_images(reference, seen),
        "features": _compare_features(reference, seen),
        "classes": _compare_classes(reference, seen, classes),
        "confidence": _compare_confidence(reference, seen),
    }
    views = {name: view for name, (view, _) in found.items() if view}
    level = max((view.level for view in views.values()), key=_LEVELS.index)
    sentences = [sentence for _, told in found.values() for sentence in told]
    return DriftReport(seen.count, reference.count, level, sentences, views)


def _compare_images(reference: Tally, seen: Tally) -> tuple[View, list[str]]:
    """Standardized mean differences, in the reference's standard deviations (Glass's delta)."""
    before, before_variance = _moments(reference.images, reference.count)
    now, now_variance = _moments(seen.images, seen.count)
    scale = np.maximum(np.sqrt(before_variance), SMALLEST_STD)
    effects = (now - before) / scale
    noises = _chance(before_variance, reference.count, now_variance, seen.count) / scale
    details = {
        name: {
            "effect": float(effects[i]),
            "noise": float(noises[i]),
            "level": _level(abs(effects[i]), noises[i], STANDARDIZED),
            "mean": float(now[i]),
            "reference_mean": float(before[i]),
        }
        for i, name in enumerate(STATISTICS + LOOKS)
    }
    # People are told of looks alone: a channel that moves shows in brightness or in its share of the light.
    looks = {name: details[name] for name in LOOKS}
    told = [name for name in ("brightness", "contrast", "saturation") if looks[name]["level"] != "none"]
    cast = max(("red", "green", "blue"), key=lambda name: abs(looks[name]["effect"]))
    fading = "saturation" in told and looks["saturation"]["effect"] < 0
    if looks[cast]["level"] != "none" and not fading:  # colors that fade all move toward gray, which is no cast
        told.append(cast)
    strongest = max(looks.values(), key=lambda look: (_LEVELS.index(look["level"]), abs(look["effect"])))
    view = View(abs(strongest["effect"]), strongest["noise"], strongest["level"], details)
    return view, [_describe(name, looks[name]) for name in told]


def _describe(name: str, look: dict[str, Any]) -> str:
    now, before = look["mean"], look["reference_mean"]
    less, more, words = _PHRASES[name]
    verb = "The images are gray" if name == "saturation" and now < GRAY <= before else less if now < before else more
    digits = 2 if abs(now - before) >= 0.02 else 3
    return f"{verb}: {words} {now:.{digits}f} against {before:.{digits}f} in training."


def _compare_features(reference: Tally, seen: Tally) -> tuple[View | None, list[str]]:
    """Root mean square over the features of Cohen's d, sampling noise taken off.

    d is in units of the root mean of both variances (Cohen 1988, equation 2.3.2). The reference's own would let one
    rectified feature that is nearly always 0 there outweigh all others. Features are correlated; the allowance is
    the one for features that are all the same.
    """
    if not (reference.features.size and seen.features.size):
        return None, []
    before, before_variance = _moments(reference.features, reference.count)
    now, now_variance = _moments(seen.features, seen.count)
    scale = (before_variance + now_variance) / 2
    varies = scale > 0
    scale = np.where(varies, scale, 1)
    squares = np.where(varies, (now - before) ** 2 / scale, 0)
    noise = math.sqrt(np.mean((now_variance / seen.count + before_variance / reference.count) / scale))
    effect = math.sqrt(max(np.mean(squares) - noise**2, 0))
    allowance = noise * math.sqrt(Z**2 - 1)
    level = _level(effect, allowance, STANDARDIZED)
    details = {"features": len(squares), "constant": int(np.count_nonzero(~varies)), "noise_taken_off": noise}
    sentence = (
        f"The network sees something else: its features differ by {effect:.2f} standard deviations from training "
        f"({STANDARDIZED[0]} is clearly visible, {STANDARDIZED[1]} large)."
    )
    return View(effect, allowance, level, details), [sentence] if level != "none" else []


def _compare_classes(reference: Tally, seen: Tally, classes: Sequence[str]) -> tuple[View, list[str]]:
    """Total variation distance of the labels, what sampling alone would give taken off in quadrature.

    The mean absolute deviation of a share is a normal's, and for a class hardly ever drawn that of its rare hits. A
    single image moves the distance by no more than one share, so by McDiarmid's inequality (1989) chance exceeds its
    mean by more than sqrt(ln(1 / CHANCE) / 2 · (1/n + 1/m)) in fewer than CHANCE of all draws.
    """
    before, now = reference.labels / reference.count, seen.labels / seen.count
    pooled = (reference.labels + seen.labels) / (reference.count + seen.count)
    rarity = 1 / seen.count + 1 / reference.count
    binomial = pooled * (1 - pooled)
    expected = float(np.minimum(np.sqrt(2 / math.pi * binomial * rarity), 2 * binomial).sum()) / 2
    limit = min(expected + math.sqrt(-math.log(CHANCE) / 2 * rarity), 1)
    distance = float(np.abs(now - before).sum()) / 2
    effect = math.sqrt(max(distance**2 - expected**2, 0))
    allowance = math.sqrt(max(limit**2 - expected**2, 0))
    level = _level(effect, allowance, SHARES)
    moved = np.argsort(-np.abs(now - before), kind="stable")[:3]
    details = {
        "distance": distance,
        "noise_taken_off": expected,
        "moved": [{"class": classes[i], "share": float(now[i]), "reference_share": float(before[i])} for i in moved],
    }
    shares = ", ".join(f"{classes[i]} {now[i]:.1%} against {before[i]:.1%}" for i in moved)
    sentence = f"The classes are mixed differently than in validation: {shares}."
    return View(effect, allowance, level, details), [sentence] if level != "none" else []


def _compare_confidence(reference: Tally, seen: Tally) -> tuple[View, list[str]]:
    """The difference of mean confidence; of a calibrated model an estimate of the difference of accuracy."""
    (before,), (before_variance,) = _moments(reference.confidence, reference.count)
    (now,), (now_variance,) = _moments(seen.confidence, seen.count)
    allowance = float(_chance(before_variance, reference.count, now_variance, seen.count))
    effect = abs(now - before)
    level = _level(effect, allowance, CONFIDENCE)
    unsure, unsure_before = (int(t.histogram[: CONFIDENCE_BINS // 2].sum()) / t.count for t in (seen, reference))
    details = {
        "mean": float(now),
        "reference_mean": float(before),
        "below_half": unsure,
        "reference_below_half": unsure_before,
    }
    sentence = (
        f"The model is {'less' if now < before else 'more'} sure than in validation: mean confidence {now:.2f} "
        f"against {before:.2f}, and below 0.5 for {unsure:.0%} of the images against {unsure_before:.0%}."
    )
    return View(float(effect), allowance, level, details), [sentence] if level != "none" else []


def _moments(sums: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means and variances of the columns; 0 for a variance that is nothing but rounding."""
    mean, square = sums / count
    variance = square - mean**2
    return mean, np.where(variance > 1e-9 * square, variance, 0) * count / (count - 1)


def _chance(before_variance: NDArray, before_count: int, now_variance: NDArray, now_count: int) -> NDArray:
    """Return the difference of two means that chance exceeds once in a thousand draws.

    Few images of a skewed quantity often miss its tail and vary too little; the reference says how much they should.
    """
    return Z * np.sqrt(np.maximum(now_variance, before_variance) / now_count + before_variance / before_count)


def _level(effect: float, noise: float, thresholds: tuple[float, float]) -> str:
    return "none" if effect <= noise else _LEVELS[sum(effect >= threshold for threshold in thresholds)]


def _rounded(value: Any) -> Any:
    """Round every float to 4 decimals; what is below depends on the order of summation."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value
