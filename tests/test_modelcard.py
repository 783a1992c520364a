"""The model's card: every figure is the JSON's, no name of a class is markup, and what is not known is not said."""

import copy

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from tasks.bundle import Bundle, load_bundle
from tasks.evaluate import EvaluateParams, summarize
from tasks.files import read_json, write_json
from tasks.modelcard import CARD, render_card
from tasks.promote import register
from tasks.tally import Tally, image_statistics
from tests.miniature import export, metrics

HOSTILE = [
    "cat | dog",
    "*bold* _under_",
    "<b>loud</b>",
    "`code` \\*",
    "[link](http://x)",
    "two\nlines",
    "$x$ ~~y~~",
    "&amp;",
]
PARAMETERS = {
    "model": {
        "backbone": "resnet20",
        "weights": None,
        "weights_sha256": None,
        "doublings": 1,
        "pool": "avg",
        "head_units": [64, 32],
    },
    "train": {"recipe": "finetune", "seed": 1, "learning_rate": 0.1},
    "augment": {"flip_horizontal": True, "shift_pixels": 4},
}


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    """The facts of a model of eight classes with names that Markdown would take for its own."""
    bundle = Bundle(
        path=tmp_path,
        format=1,
        id="abc123def456",
        created="2026-01-01T00:00:00+00:00",
        classes=HOSTILE,
        decode={"size": 32},
        normalization={"mode": "standardize", "mean": [125.2, 122.9, 113.8]},
        parameters=PARAMETERS,
        data_digest="d" * 64,
        test_digest="t1",
        libraries={"keras": "3.15.1"},
        training={"training_images": 44_996, "device": "two_cores"},
        engines={
            "keras-float32": {"offered": True, "images_per_second": 1854.8},
            "openvino-int8": {"offered": False, "agreement": 0.5},
        },
        machine={"processor": "AMD EPYC", "cores": 2},
        temperature=1.2952,
        threshold=0.93987,
    )
    tally = Tally()
    tally.add(np.stack([image_statistics(np.zeros((4, 4, 3), np.uint8))] * 5), None, np.full((5, 8), 0.125))
    tally.save(bundle.reference_file)
    return bundle


@pytest.fixture(scope="module")
def evaluated():
    """The metrics of 400 made-up answers, of which most are right."""
    random = np.random.default_rng(0)
    targets = np.repeat(np.arange(8), 50)
    logits = random.normal(size=(400, 8))
    logits[np.arange(400), targets] += random.uniform(1, 4, 400) * (1 + targets / 4)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    engines = {"keras-float32": probabilities.astype(np.float32), "openvino-int8": probabilities[:, ::-1].copy()}
    facts = {"model_id": "abc123def456", "test_digest": "t1", "threshold": 0.9, "temperature": 1.2952}
    return summarize(engines, targets, HOSTILE, EvaluateParams(), **facts).metrics


def plain(token) -> str:
    """Return what a reader sees of a line."""
    return "".join(child.content for child in token.children if child.type in ("text", "code_inline"))


def read(card: str) -> tuple[dict[str, list[tuple[str, ...]]], str]:
    """Return a card's tables by their first heading, the later ones after the earlier, and all that is read of it."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card)
    rows: list[tuple[str, ...]] = []
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append(())
        elif token.type in ("th_open", "td_open"):
            rows[-1] += (plain(tokens[index + 1]),)
        elif token.type == "table_close":
            tables.setdefault(rows[0][0], []).extend(rows[1:])
    return tables, "\n".join(plain(token) for token in tokens if token.type == "inline")


def test_every_figure_is_the_evaluations(bundle, evaluated):
    tables, text = read(render_card(bundle, evaluated))
    figures = {name: (value, interval) for name, value, interval in tables["figure"]}
    low, high = evaluated["accuracy_low"], evaluated["accuracy_high"]
    assert figures["accuracy (top-1)"] == (f"{evaluated['accuracy']:.2%}", f"{low:.2%} to {high:.2%}")
    for name, key in {
        "top-5 error": "top5_error",
        "macro F1": "macro_f1",
        "calibration error": "calibration_error",
        "accepted answers": "accepted",
        "accuracy among them": "accepted_accuracy",
    }.items():
        assert figures[name][0] == f"{evaluated[key]:.2%}"
    assert figures["log loss"][0] == f"{evaluated['log_loss']:.4f}"
    assert figures["log loss without the temperature"][0] == f"{evaluated['uncalibrated']['log_loss']:.4f}"
    assert figures["calibration error without it"][0] == f"{evaluated['uncalibrated']['calibration_error']:.2%}"
    engines = {name: rest for name, *rest in tables["engine"]}
    found = evaluated["engines"]["openvino-int8"]
    assert engines["keras-float32"] == [f"{evaluated['accuracy']:.2%}", "100.00%", "yes", "1,854.8"]
    assert engines["openvino-int8"] == [f"{found['accuracy']:.2%}", f"{found['agreement']:.2%}", "no", ""]
    per_class = evaluated["per_class"]
    shown = {name: figures for name, *figures in tables["class"]}
    assert shown == {
        " ".join(name.split()): [*(f"{facts[key]:.2%}" for key in ("recall", "precision", "f1")), str(facts["images"])]
        for name, facts in per_class.items()
    }
    recalls = [float(row[1].rstrip("%")) for row in tables["class"]]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1]
    worst = min(per_class, key=lambda name: per_class[name]["recall"])
    assert f"{worst} ({per_class[worst]['recall']:.2%} of 50 test pictures recognized)" in text
    assert f"{evaluated['mistakes']} test pictures got a wrong label" in text
    assert "statistics of 5 pictures" in text
    assert "(95% interval)" in text
    assert "Engine openvino-int8 is not offered: same label as Keras on 50.00% of the validation images" in text


def leaves(values, path=()):
    """Yield the path of every number in nested dictionaries and lists."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield *path, key


def test_no_figure_is_written_down_twice_or_made_up(bundle, evaluated):
    """Whatever number of the evaluation changes, the card changes; only the engines' fine print is not in it."""
    card = render_card(bundle, evaluated)
    unsaid = set()
    for path in leaves(evaluated):
        other = copy.deepcopy(evaluated)
        holder = other
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] += 3
        if render_card(bundle, other) == card:
            unsaid.add(path[-1])
    # The temperature stands in the card as the bundle has it, and small errors beside the shares of agreement.
    assert unsaid <= {"temperature", "accuracy_lost", "max_difference"}


def test_a_name_is_never_markup(bundle, evaluated):
    card = render_card(bundle, evaluated)
    tables, text = read(card)
    assert {row[0] for row in tables["class"]} == {" ".join(name.split()) for name in HOSTILE}
    assert f"shows: {', '.join(' '.join(name.split()) for name in HOSTILE)}." in text
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card)
    for tag in ("<b>", "<em>", "<strong>", "<a ", "<s>"):
        assert tag not in page
    # Every row of a table has its table's width, so no name has opened a cell.
    assert {len(row) for row in tables["class"]} == {5}


def test_the_facts_are_the_bundles(bundle, evaluated):
    card = render_card(bundle, evaluated)
    tables, text = read(card)
    facts = dict(tables[""])
    assert facts["model"] == bundle.id
    assert facts["prepared data"] == bundle.data_digest
    assert facts["network"] == "resnet20, on pictures upsampled to 64 × 64 px inside the model"
    assert facts["features"] == "the mean over all places, then dense layers of 64, 32"
    assert facts["began from"] == "random weights"
    assert facts["training_images"] == "44996"
    assert facts["device"] == "two_cores"
    assert facts["normalization: mean"] == "125.2, 122.9, 113.8"
    assert facts["decoding: size"] == "32"
    assert tables["library"] == [("keras", "3.15.1")]
    assert "0.9399 or more" in text
    assert f"nightly predict FOLDER --model models/registry/{bundle.id}" in card
    blocks = [token.content for token in MarkdownIt().parse(card) if token.type == "code_block"]
    assert yaml.safe_load(blocks[-1]) == PARAMETERS
    assert "has changed" not in text
    assert "has changed" in read(render_card(bundle.changed(path=bundle.path, test_digest="t0"), evaluated))[1]


@pytest.mark.parametrize(
    ("weights", "sha256", "training", "words"),
    [
        (None, None, {}, "random weights"),
        ("imagenet", None, {}, "imagenet"),
        ("backbone.h5", "5f5f", {}, "backbone.h5, SHA-256 5f5f"),
        (None, None, {"warm_start": "0ld"}, "the weights of model 0ld"),
        ("backbone.h5", "5f5f", {"warm_start": "0ld"}, "the weights of model 0ld"),
    ],
)
def test_a_model_began_from_the_weights_that_its_training_began_with(
    bundle, evaluated, weights, sha256, training, words
):
    model = PARAMETERS["model"] | {"weights": weights, "weights_sha256": sha256}
    other = bundle.changed(path=bundle.path, parameters={"model": model}, training=training)
    assert dict(read(render_card(other, evaluated))[0][""])["began from"] == words


def test_how_many_of_no_accepted_answers_are_right_is_not_said(bundle, evaluated):
    tables, text = read(render_card(bundle, {**evaluated, "accepted": 0.0, "accepted_accuracy": 0.0}))
    names = [name for name, _, _ in tables["figure"]]
    assert "accepted answers" in names
    assert "accuracy among them" not in names
    assert "At the threshold 0.9, 0.00% of the test pictures were accepted." in text


def test_the_top_5_error_of_five_classes_is_not_in_the_card(bundle, evaluated):
    for count, there in ((5, False), (6, True)):
        classes = dict(list(evaluated["per_class"].items())[:count])
        names = [name for name, *_ in read(render_card(bundle, {**evaluated, "per_class": classes}))[0]["figure"]]
        assert ("top-5 error" in names) is there


def test_what_an_older_evaluation_lacks_is_not_in_the_card(tmp_path):
    exported, evaluation = export(tmp_path, "m1")
    before = (exported / "bundle.json").read_bytes()
    register(exported, evaluation, tmp_path / "registry")
    card = (tmp_path / "registry" / "m1" / CARD).read_text()
    tables, text = read(card)
    assert tables["figure"] == [("accuracy (top-1)", "90.00%", "")]
    assert {"class", "engine", "library"}.isdisjoint(tables)
    assert "weakest" not in text
    assert "accepted" not in text
    assert load_bundle(tmp_path / "registry" / "m1").id == "m1"
    assert (exported / "bundle.json").read_bytes() == before
    assert not (exported / CARD).exists()


def test_a_registered_card_is_never_changed_and_knows_the_test_splits_evidence(tmp_path):
    exported, evaluation = export(tmp_path, "m1")
    engines = {"openvino-int8": {"offered": True, "images_per_second": 14411.8}}
    load_bundle(exported).changed(path=exported, engines=engines).save()
    tested = {"openvino-int8": {"accuracy": 0.5, "agreement": 0.6, "passed": False}}
    write_json(evaluation / "metrics.json", {**metrics("m1", 0.9), "engines": tested})
    card = tmp_path / "registry" / "m1" / CARD
    register(exported, evaluation, tmp_path / "registry")
    assert read(card.read_text())[0]["engine"] == [("openvino-int8", "50.00%", "60.00%", "no", "14,411.8")]
    written = card.read_bytes()
    write_json(evaluation / "metrics.json", metrics("m1", 0.1))
    register(exported, evaluation, tmp_path / "registry")
    assert card.read_bytes() == written
    assert read_json(card.parent / "evaluation" / "metrics.json")["accuracy"] == 0.9
