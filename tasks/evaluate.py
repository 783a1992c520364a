"""Measure every engine of a model on the frozen test split; write metrics, predictions, plots and the report."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from tasks import metrics
from tasks.bundle import Bundle, Limits, load_bundle, load_keras_model
from tasks.calibration import apply_temperature
from tasks.choice import available, compare, evidence, offered
from tasks.data import load_split
from tasks.engines import REFERENCE, Engine, open_engine
from tasks.errors import NightlyError, run_main
from tasks.files import publish_directory, read_json, write_json, write_text
from tasks.heat import GradCam, overlay
from tasks.judge import Evaluated
from tasks.params import Section, read_section
from tasks.progress import progress
from tasks.report import Picture, ReportData, render_report
from tasks.rival import read_rival

#: Classes whose probabilities a picture shows.
TOP = 3


class EvaluateParams(Section):
    """How the test split is run and what the report shows; none of it changes an accuracy.

    Attributes:
        batch_size: images per inference batch of Keras; null leaves it to the engine, as OpenVINO's always is.
        calibration_bins: equal-width confidence bins of the calibration error.
        confidence_level: of the intervals.
        pictures: mistakes, and as many hits, shown in the report.
    """

    batch_size: int | None = Field(default=None, ge=1, le=4096)
    calibration_bins: int = Field(default=15, ge=2, le=100)
    confidence_level: float = Field(default=0.95, gt=0, lt=1)
    pictures: int = Field(default=24, ge=0, le=64)


@dataclass(frozen=True)
class EvaluateSummary:
    """What the night needs to know of an evaluation."""

    model_id: str
    accuracy: float
    test_images: int
    report: Path


@dataclass(frozen=True)
class Evaluation:
    """Everything measured, before any of it is written.

    Attributes:
        metrics: the content of metrics.json.
        predictions: one row per test image: ``index, target, label, correct, confidence, p_0, p_1, ...``; where they
            are written, ``name`` is that of the source image.
        matrix: confusion counts ``(C, C)``, true classes in rows.
        bins: of the confidences; ``raw_bins`` those before temperature scaling.
        mistakes: indexes of wrong predictions, the most confident first.
        hits: indexes of right predictions, the least confident first.
    """

    metrics: dict[str, Any]
    predictions: pd.DataFrame
    matrix: np.ndarray
    bins: list[metrics.CalibrationBin]
    raw_bins: list[metrics.CalibrationBin]
    mistakes: list[int]
    hits: list[int]


def summarize(
    probabilities: Mapping[str, np.ndarray],
    targets: np.ndarray,
    classes: list[str],
    params: EvaluateParams,
    *,
    model_id: str,
    test_digest: str,
    threshold: float | None,
    temperature: float = 1.0,
    limits: Limits | None = None,
) -> Evaluation:
    """Measure the engines' probabilities against the targets; every headline figure is ``keras-float32``'s.

    All of them are what prediction gives, after temperature scaling.

    Shares are rounded to six decimals and differences to two digits, so that metrics.json shows the same
    figures on the next run of the same model. Beyond those named in ``tasks.metrics``, it holds

    - ``accuracy_low``, ``accuracy_high``: Wilson interval of the accuracy at ``confidence_level``, the parameter;
    - ``mistakes``: number of wrong labels; ``macro_f1``: mean F1 over the classes that have test images;
    - ``top1_error``, ``top5_error``: as He et al., "Deep Residual Learning for Image Recognition", 2016, report them;
    - ``intervals``: low and high end of the other figures, Wilson's for shares, of the bootstrap for the rest. Lists,
      which DVC leaves out when it compares metrics;
    - ``temperature``: the bundle's, and under ``uncalibrated`` what ``log_loss`` and ``calibration_error`` were
      without it;
    - ``threshold``: the bundle's, and at it ``accepted``: share of images at least that confident, and
      ``accepted_accuracy``: accuracy among them, 0 if there are none. All three are absent without a threshold;
    - ``engines``: what ``tasks.choice.compare`` finds of each.

    Args:
        probabilities: ``(N, C)`` by engine name, ``keras-float32`` among them, as the engines give them.
        targets: class indexes ``(N,)``.

    Raises:
        NightlyError: an engine gave probabilities of another shape, or some that are no numbers.
    """
    for name, values in probabilities.items():
        _check_probabilities(name, values, (len(targets), len(classes)))
    wilson = partial(metrics.wilson_interval, level=params.confidence_level)
    raw = probabilities[REFERENCE]
    probabilities = {name: apply_temperature(values, temperature) for name, values in probabilities.items()}
    reference = probabilities[REFERENCE]
    labels = metrics.predicted_labels(reference)
    confidence = reference.max(axis=1).astype(np.float64)
    correct = labels == targets
    matrix = metrics.confusion_matrix(targets, labels, len(classes))
    scores = metrics.class_scores(matrix)
    bins = metrics.calibration_bins(confidence, correct, params.calibration_bins)
    raw_bins = metrics.calibration_bins(raw.max(axis=1), correct, params.calibration_bins)
    errors = {f"top{k}_error": metrics.top_k_error(targets, reference, k) for k in (1, 5)}
    intervals = {name: wilson(round(share * len(targets)), len(targets)) for name, share in errors.items()}
    intervals |= metrics.bootstrap_intervals(targets, reference, params.calibration_bins, params.confidence_level)
    low, high = wilson(int(correct.sum()), len(targets))
    figures: dict[str, Any] = {
        "model_id": model_id,
        "test_digest": test_digest,
        "test_images": len(targets),
        "mistakes": int((~correct).sum()),
        "accuracy": _share(correct.mean()),
        "accuracy_low": _share(low),
        "accuracy_high": _share(high),
        "confidence_level": params.confidence_level,
        **{name: _share(share) for name, share in errors.items()},
        "macro_f1": _share(metrics.macro_f1(scores)),
        "log_loss": _share(metrics.log_loss(targets, reference)),
        "calibration_error": _share(metrics.calibration_error(bins)),
        "temperature": temperature,
        "uncalibrated": {
            "log_loss": _share(metrics.log_loss(targets, raw)),
            "calibration_error": _share(metrics.calibration_error(raw_bins)),
        },
    }
    if threshold is not None:
        accepted = confidence >= threshold
        figures["threshold"] = _share(threshold)
        figures["accepted"] = _share(accepted.mean())
        figures["accepted_accuracy"] = _share(metrics.accuracy(targets[accepted], labels[accepted]))
        intervals["accepted"] = wilson(int(accepted.sum()), len(targets))
        intervals["accepted_accuracy"] = wilson(int((accepted & correct).sum()), int(accepted.sum()))
    figures["intervals"] = {name: [_share(low), _share(high)] for name, (low, high) in intervals.items()}
    figures["per_class"] = {
        name: {
            "precision": _share(scores.precision[i]),
            "recall": _share(scores.recall[i]),
            "f1": _share(scores.f1[i]),
            "images": int(scores.images[i]),
        }
        for i, name in enumerate(classes)
    }
    figures["engines"] = {
        name: compare(reference, values, targets, limits or Limits()) for name, values in probabilities.items()
    }
    by_confidence = np.argsort(confidence, kind="stable")
    return Evaluation(
        metrics=figures,
        predictions=_prediction_rows(reference, targets, labels, confidence, classes),
        matrix=matrix,
        bins=bins,
        raw_bins=raw_bins,
        mistakes=[int(i) for i in by_confidence[::-1] if not correct[i]][: params.pictures],
        hits=[int(i) for i in by_confidence if correct[i]][: params.pictures],
    )


def evaluate(
    exported: Path, prepared: Path, out: Path, params: EvaluateParams, models: Path | None = None
) -> EvaluateSummary:
    """Run every engine of the bundle on the test split and publish what was measured in ``out``.

    Args:
        models: where champion.json names the model in service; the report then has both, as they stand now. Nothing
            else that is written depends on it.

    Raises:
        NightlyError: the test split is empty, or its classes or image size are not the model's.
    """
    bundle, test = load_bundle(exported), load_split(prepared, "test")
    images, targets = test.images, test.targets.argmax(axis=1)
    facts = read_json(prepared / "prepared.json")
    _check_test_split(bundle, read_json(prepared / "classes.json"), images)
    probabilities = {}
    for name in [REFERENCE, *(name for name in bundle.engines if name != REFERENCE and available(bundle, name))]:
        probabilities[name] = _run(open_engine(bundle, name, batch_size=params.batch_size), images)
    evaluation = summarize(
        probabilities,
        targets,
        bundle.classes,
        params,
        model_id=bundle.id,
        test_digest=facts["test_digest"],
        threshold=bundle.threshold,
        temperature=bundle.temperature,
        limits=bundle.limits,
    )
    manifest = pd.read_parquet(prepared / "manifest.parquet")
    used = manifest[manifest["status"] == "ok"]
    table = evaluation.predictions
    table.insert(1, "name", used[used["split"] == "test"].sort_values("position")["name"].to_numpy())
    challenger = Evaluated(evaluation.metrics, table["target"].to_numpy(), table["correct"].to_numpy())
    shown = [*evaluation.mistakes, *evaluation.hits]
    heats = dict(zip(shown, _heat_maps(bundle, images[shown], table["label"][shown]), strict=True))
    report = ReportData(
        metrics=evaluation.metrics,
        classes=bundle.classes,
        matrix=evaluation.matrix,
        predictions=table,
        images=images,
        bins=evaluation.bins,
        raw_bins=evaluation.raw_bins,
        mistakes=[_picture(table.iloc[i], images[i], bundle.classes, heats[i]) for i in evaluation.mistakes],
        hits=[_picture(table.iloc[i], images[i], bundle.classes, heats[i]) for i in evaluation.hits],
        history=_history(bundle),
        facts=bundle.model_dump(mode="json", exclude={"path"}),
        data=facts,
        class_counts=used.groupby(["class", "split"]).size().unstack(fill_value=0).to_dict("index"),
        reference=REFERENCE,
        notes=_notes(bundle, facts),
        unmeasured=[_unmeasured(bundle, name) for name in bundle.engines if name not in probabilities],
        rival=read_rival(models, challenger) if models else None,
    )
    with publish_directory(out) as folder:
        write_json(folder / "metrics.json", evaluation.metrics)
        table.to_parquet(folder / "predictions.parquet", index=False)
        _write_plots(folder / "plots", evaluation)
        write_text(folder / "report.html", render_report(report))
    return EvaluateSummary(bundle.id, evaluation.metrics["accuracy"], len(targets), out / "report.html")


def _check_test_split(bundle: Bundle, classes: list[str], images: np.ndarray) -> None:
    if classes != bundle.classes:
        unlike = [name for name in (*classes, *bundle.classes) if (name in classes) != (name in bundle.classes)]
        reason = f"only one of them has {', '.join(map(repr, unlike[:5]))}" if unlike else "their order differs"
        raise NightlyError(
            f"model {bundle.id} has {len(bundle.classes)} classes and the test split {len(classes)}: {reason}"
        )
    size = bundle.decode.size
    if images.shape[1:] != (size, size, 3):
        raise NightlyError(
            f"model {bundle.id} takes images {(size, size, 3)}, but the test split has {images.shape[1:]}"
        )
    if not len(images):
        raise NightlyError("the test split must hold at least one image, but is empty: add images or change the split")


def _check_probabilities(name: str, values: np.ndarray, shape: tuple[int, int]) -> None:
    if values.shape != shape:
        raise NightlyError(f"engine {name} must give probabilities {shape}, but gave {values.shape}")
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise NightlyError(
            f"engine {name} must give a number for every class, but gave NaN or infinity for {bad:,} of "
            f"{shape[0]:,} test images: the training diverged"
        )


def _prediction_rows(
    probabilities: np.ndarray, targets: np.ndarray, labels: np.ndarray, confidence: np.ndarray, classes: list[str]
) -> pd.DataFrame:
    names = np.array(classes, dtype=object)
    columns = {
        "index": np.arange(len(targets)),
        "target": names[targets],
        "label": names[labels],
        "correct": labels == targets,
        "confidence": confidence.astype(np.float32),
        **{f"p_{i}": probabilities[:, i].astype(np.float32) for i in range(len(classes))},
    }
    return pd.DataFrame(columns)


def _write_plots(folder: Path, evaluation: Evaluation) -> None:
    """Write the CSV files that DVC plots: a row per image for its confusion template, per filled bin, per class."""
    folder.mkdir()
    confusion = evaluation.predictions[["target", "label"]]
    confusion.columns = ["actual", "predicted"]
    confusion.to_csv(folder / "confusion.csv", index=False, lineterminator="\n")
    filled = [b for b in evaluation.bins if b.images]
    calibration = pd.DataFrame(
        {
            "confidence": [_share(b.confidence) for b in filled],
            "accuracy": [_share(b.accuracy) for b in filled],
            "images": [b.images for b in filled],
        }
    )
    calibration.to_csv(folder / "calibration.csv", index=False, lineterminator="\n")
    classes = pd.DataFrame.from_dict(evaluation.metrics["per_class"], orient="index")
    classes.to_csv(folder / "classes.csv", index_label="class", lineterminator="\n")


def _history(bundle: Bundle) -> pd.DataFrame:
    path = bundle.path / "history.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def _notes(bundle: Bundle, prepared: Mapping[str, Any]) -> list[str]:
    if bundle.test_digest == prepared["test_digest"]:
        return []
    return [
        "The test split has changed since this model was trained: its figures compare only with those of "
        "models measured on the same test data."
    ]


def _unmeasured(bundle: Bundle, name: str) -> str:
    why = (
        "was not measured, because this processor does not run it"
        if offered(bundle, name)
        else "is not offered and was not measured"
    )
    return f"{name} {why}: {evidence(bundle, name)}"


def _heat_maps(bundle: Bundle, images: np.ndarray, labels: Iterable[str]) -> list[np.ndarray | None]:
    """Return each image uint8 (H, W, 3) with what spoke for its label laid over it, None where nothing did."""
    if not len(images):
        return []
    gradcam = GradCam(load_keras_model(bundle))
    heats = gradcam.heat(images, [bundle.classes.index(label) for label in labels])
    return [overlay(pixels, heat) if heat.any() else None for pixels, heat in zip(images, heats, strict=True)]


def _picture(row: pd.Series, pixels: np.ndarray, classes: list[str], heat: np.ndarray | None) -> Picture:
    probabilities = row[[f"p_{i}" for i in range(len(classes))]].to_numpy(np.float64)
    ranked = [int(i) for i in np.argsort(-probabilities, kind="stable")]
    target = classes.index(row["target"])
    shown = ranked[:TOP] if target in ranked[:TOP] else [*ranked[: TOP - 1], target]
    return Picture(
        index=int(row["index"]),
        pixels=pixels,
        target=row["target"],
        top=[(classes[i], float(probabilities[i])) for i in shown],
        name=row["name"],
        heat=heat,
    )


def _share(value: float) -> float:
    return round(float(value), 6)


def _run(engine: Engine, images: np.ndarray) -> np.ndarray:
    """Return the engine's probabilities, showing how far it is."""
    starts = range(0, len(images), engine.batch_size)
    batches = (images[start : start + engine.batch_size] for start in starts)
    parts = []
    with progress(f"Testing {engine.name}", len(images)) as advance:
        for part in engine.stream(batches):
            parts.append(part)
            advance(len(part))
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=evaluate.__doc__.splitlines()[0])
    parser.add_argument("--exported", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="where champion.json names a model to compare with")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    params = read_section(args.params, "evaluate", EvaluateParams)
    summary = evaluate(args.exported, args.prepared, args.out, params, args.models)
    print(f"evaluated model {summary.model_id}: accuracy {summary.accuracy:.4f} on {summary.test_images:,} test images")
    print(f"report: {summary.report}")


if __name__ == "__main__":
    run_main(main)
