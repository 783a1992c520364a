"""What the depth study found: figures, tables and a page that says it in words, all from the trainings' results."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tasks.augmentation import AugmentParams
from tasks.charts import compact
from tasks.files import publish_directory, write_json, write_text
from tasks.pages import render, rows_of
from tasks.preview import describe
from tasks.study import l2_weight_decay
from tasks.study_figures import Curve, chart, draw, label

#: Test errors of the paper's networks on CIFAR-10: He et al. 2015, table 6; 110 layers: the best of five runs, whose
#: mean and standard deviation are 6.61 ± 0.16 %. Its plain networks' errors are only drawn, in figure 6.
PUBLISHED = {"resnet20": 0.0875, "resnet32": 0.0751, "resnet44": 0.0717, "resnet56": 0.0697, "resnet110": 0.0643}
PUBLISHED_IMAGES = 64_000 * 128
#: The source, as section ``download`` names it, that they are of.
PUBLISHED_SOURCE = "cifar10"
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One network's line of the table; errors are shares, means over the seeds; deviations need two of these."""

    network: str
    family: str
    depth: int
    parameters: int
    multiply_adds: int
    seeds: int
    seconds_per_epoch: float
    training_error: float
    final_training_error: float
    test_error: float
    test_error_sd: float | None
    top5_error: float
    published_test_error: float | None


@dataclass(frozen=True)
class StudySummary:
    """The study in one line, and as a Markdown text."""

    headline: str
    markdown: str


def make_rows(results: Sequence[Result], source: str) -> list[Row]:
    """Return a row for each network, by family and depth; with the published errors if they are of this source."""
    rows, published = [], PUBLISHED if source == PUBLISHED_SOURCE else {}
    for name, runs in _by_network(results).items():
        first, tests = runs[0], [run["test_error"] for run in runs]
        rows.append(
            Row(
                name,
                first["family"],
                first["depth"],
                first["parameters"],
                first["multiply_adds"],
                len(runs),
                round(statistics.median(run["seconds_per_epoch"] for run in runs), 1),
                statistics.mean(_last_training_errors(runs)),
                statistics.mean(run["final_training_error"] for run in runs),
                statistics.mean(tests),
                statistics.stdev(tests) if len(tests) > 1 else None,
                statistics.mean(run["top5_error"] for run in runs),
                published.get(name),
            )
        )
    return rows


def make_curves(results: Sequence[Result]) -> list[Curve]:
    """Return the networks' curves, in the order of the rows."""
    curves = []
    for name, runs in _by_network(results).items():
        lines: dict[str, list] = {"training_error": [], "test_error": []}
        for points in zip(*(run["curve"] for run in runs), strict=True):
            for kind, line in lines.items():
                values = [point[kind] for point in points]
                line.append((points[0]["iteration"], statistics.mean(values), min(values), max(values)))
        curves.append(Curve(name, runs[0]["family"], lines["training_error"], lines["test_error"]))
    return curves


def make_sentences(results: Sequence[Result]) -> list[str]:
    """Say what the figures show: deeper against shallower in each family, then with against without shortcuts."""
    networks = _by_network(results)
    extremes = _extremes(networks)
    sentences = [
        _contrast(networks[shallow], networks[deep], f"In the {networks[deep][0]['family']} networks")
        for shallow, deep in extremes
    ]
    for _, deep in extremes:
        twin = deep.replace("plain", "resnet")
        if twin != deep and twin in networks:
            sentences.append(_contrast(networks[deep], networks[twin], f"At {networks[deep][0]['depth']} layers"))
    for plain in extremes:
        twins = tuple(name.replace("plain", "resnet") for name in plain)
        if twins != plain and set(twins) <= set(networks):
            without, with_shortcuts = (_gap(networks, *pair) * 100 for pair in (plain, twins))
            depths = [networks[name][0]["depth"] for name in plain]
            sentences.append(
                f"From {depths[0]} to {depths[1]} layers the training error changes by {without:+.1f} points without "
                f"shortcuts and by {with_shortcuts:+.1f} with them."
            )
    return sentences


def make_headline(results: Sequence[Result]) -> str:
    """Return the study in one line: what depth does to the training error, family by family."""
    parts, networks = [], _by_network(results)
    extremes = _extremes(networks)
    # Where there are many, those of the paper's figure.
    main = [pair for pair in extremes if networks[pair[1]][0]["family"] in ("plain", "ResNet")]
    for shallow, deep in main or extremes:
        errors = [_last_training_errors(networks[name]) for name in (shallow, deep)]
        gap = _gap(networks, shallow, deep)
        doubt = " (one seed)" if min(map(len, errors)) < 2 else " (within chance)"
        chance = "" if _clear(*errors) else doubt
        word = "worse" if gap > 0 else "better"
        parts.append(f"{label(deep)} trains {abs(gap) * 100:.1f} points {word} than {label(shallow)}{chance}")
    return "; ".join(parts) or f"{len(results)} trainings, no two depths of a family to compare"


def write_report(results: Sequence[Result], out: Path, source: str) -> StudySummary:
    """Publish ``study.json``, ``table.csv``, ``curves.csv``, the figures and ``report.html`` in the directory ``out``.

    Args:
        results: of trainings with the same recipe, as tasks.study_run writes them.
        source: where the images come from, as section ``download`` names it.
    """
    rows, curves = make_rows(results, source), make_curves(results)
    sentences, headline, facts = make_sentences(results), make_headline(results), make_facts(results, source)
    with publish_directory(out) as partial:
        table = [asdict(row) for row in rows]
        write_json(
            partial / "study.json", {"headline": headline, "sentences": sentences, "facts": facts, "networks": table}
        )
        pd.DataFrame(table).to_csv(partial / "table.csv", index=False)
        _curve_table(curves).to_csv(partial / "curves.csv", index=False)
        draw(partial / "figure", curves)
        for family in {curve.family for curve in curves}:
            chosen = [curve for curve in curves if curve.family == family]
            draw(partial / f"figure-{family.lower().replace(', ', '-')}", chosen, curves)
        write_text(partial / "report.html", _page(rows, curves, sentences, headline, facts, results))
    return StudySummary(headline, markdown(rows, sentences, headline, published=source == PUBLISHED_SOURCE))


def make_facts(results: Sequence[Result], source: str) -> dict[str, Any]:
    """Return what all trainings have in common, and how long they took together."""
    first = max(results, key=lambda run: len(run["curve"]))
    train = first["recipe"]["train"]
    iterations = first["curve"][-1]["iteration"]
    return {
        "source": source,
        "trainings": len(results),
        "iterations": iterations,
        "batch_size": train["batch_size"],
        "evaluate_every": first["recipe"]["evaluate_every"],
        "epochs": round(iterations * train["batch_size"] / first["train_images"], 2),
        "share_of_the_papers_images": round(iterations * train["batch_size"] / PUBLISHED_IMAGES, 6),
        "train_images": first["train_images"],
        "test_images": first["test_images"],
        "curve_test_images": first["curve_test_images"],
        "final_train_images": first["final_train_images"],
        "training_seconds": round(sum(run["training_seconds"] for run in results)),
        # The least and the most: what was trained by an earlier study had its own.
        "parallel": [choose(run["parallel"] for run in results) for choose in (min, max)],
        "in_parts": sorted({label(run["network"]) for run in results if run.get("micro_batches", 1) > 1}),
        "devices": sorted({f"{run['device']} ({run['backend']}, {run['precision']})" for run in results}),
    }


def markdown(rows: Sequence[Row], sentences: Sequence[str], headline: str, *, published: bool) -> str:
    """Return headline, sentences and table as Markdown, the last column of it only where errors were published."""
    columns = (
        "network",
        "parameters",
        "multiply-adds",
        "s/epoch",
        "training error",
        "without augmentation",
        "test error",
        "top-5 error",
        *(["published for CIFAR-10"] if published else []),
    )
    lines = [f"**{headline}**", "", *(f"- {sentence}" for sentence in sentences), ""]
    lines += ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    for row in rows:
        cells = (
            label(row.network),
            compact(row.parameters),
            compact(row.multiply_adds),
            f"{row.seconds_per_epoch:,.1f}",
            f"{row.training_error:.2%}",
            f"{row.final_training_error:.2%}",
            f"{row.test_error:.2%}" + ("" if row.test_error_sd is None else f" ± {row.test_error_sd * 100:.2f}"),
            f"{row.top5_error:.2%}",
        )
        if published:
            cells += ("" if row.published_test_error is None else f"{row.published_test_error:.2%}",)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _page(
    rows: Sequence[Row],
    curves: Sequence[Curve],
    sentences: Sequence[str],
    headline: str,
    facts: Mapping[str, Any],
    results: Sequence[Result],
) -> str:
    families = list(dict.fromkeys(curve.family for curve in curves))
    recipe = results[0]["recipe"]
    return render(
        "study.html",
        headline=headline[0].upper() + headline[1:],
        sentences=sentences,
        facts=facts,
        published=facts["source"] == PUBLISHED_SOURCE,
        rows=rows,
        label=label,
        compact=compact,
        figures=[(family, chart([curve for curve in curves if curve.family == family], curves)) for family in families],
        records=[
            ("Training", _training_record(recipe)),
            (
                "Learning rates",
                rows_of({label(run["network"]): run["recipe"]["train"]["learning_rate"] for run in results}),
            ),
            ("Runs", [(f"{label(run['network'])}, seed {run['seed']}", run["digest"]) for run in results]),
        ],
    )


def _training_record(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of what the trainings had in common."""
    train = recipe["train"]
    kept = {name: train[name] for name in ("optimizer", "momentum", "nesterov", "schedule", "batch_size")}
    # The recipe has that of a decay beside the loss, ten times as much with a momentum of 0.9.
    kept["weight decay (L2, of kernels only)"] = l2_weight_decay(train)
    return [*rows_of(kept), ("augmentation", describe(AugmentParams(**recipe["augment"])))]


def _curve_table(curves: Sequence[Curve]) -> pd.DataFrame:
    table = []
    for curve in curves:
        for training, test in zip(curve.training, curve.test, strict=True):
            found = {"network": curve.network, "iteration": training[0]}
            for kind, point in (("training_error", training), ("test_error", test)):
                found |= dict(zip((kind, f"{kind}_low", f"{kind}_high"), point[1:], strict=True))
            table.append(found)
    return pd.DataFrame(table)


def _contrast(one: Sequence[Result], other: Sequence[Result], where: str) -> str:
    """Compare two networks' training errors in the last interval, and say whether the test errors agree."""
    a, b = (label(runs[0]["network"]) for runs in (one, other))
    train = [_last_training_errors(runs) for runs in (one, other)]
    test = [[run["test_error"] for run in runs] for runs in (one, other)]
    gap = statistics.mean(train[1]) - statistics.mean(train[0])
    test_gap = statistics.mean(test[1]) - statistics.mean(test[0])
    found = (
        f"{where}, {b} ends with a training error of {statistics.mean(train[1]):.1%} and {a} with "
        f"{statistics.mean(train[0]):.1%}: {abs(gap) * 100:.1f} points {'more' if gap > 0 else 'less'}. "
    )
    if min(map(len, train)) < 2:
        found += "With one seed nothing is known about chance"
    else:
        found += f"Seeds of the same network differ by up to {max(map(_spread, train)) * 100:.1f} points"
        found += "" if _clear(*train) else ": this may be chance"
    agree = (
        "So it is on the test images" if (test_gap > 0) == (gap > 0) else "On the test images it is the other way round"
    )
    return f"{found}. {agree}: {statistics.mean(test[1]):.1%} and {statistics.mean(test[0]):.1%}."


def _gap(networks: Mapping[str, list[Result]], one: str, other: str) -> float:
    """Return by how much the mean training error of the other is higher."""
    means = [statistics.mean(_last_training_errors(networks[name])) for name in (one, other)]
    return means[1] - means[0]


def _clear(one: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether two networks differ by more than seeds of the same network do; with one seed nobody knows."""
    gap = abs(statistics.mean(one) - statistics.mean(other))
    apart = max(one) < min(other) or max(other) < min(one)
    return min(len(one), len(other)) > 1 and apart and gap > max(_spread(one), _spread(other))


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _last_training_errors(runs: Sequence[Result]) -> list[float]:
    return [run["curve"][-1]["training_error"] for run in runs]


def _extremes(networks: Mapping[str, list[Result]]) -> list[tuple[str, str]]:
    """Return the shallowest and the deepest network of each family that has two or more."""
    families: dict[str, list[str]] = {}
    for name, runs in networks.items():
        families.setdefault(runs[0]["family"], []).append(name)
    return [(names[0], names[-1]) for names in families.values() if len(names) > 1]


def _by_network(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each network, by family and growing depth."""
    found: dict[str, list[Result]] = {}
    for run in sorted(results, key=lambda run: (run["family"].lower(), run["depth"], run["seed"])):
        found.setdefault(run["network"], []).append(run)
    return found
