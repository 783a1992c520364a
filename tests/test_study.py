"""The depth study's trainings: which there are, what one leaves behind, killed or not, and what the report says."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tasks.augmentation import AugmentParams
from tasks.data import Split
from tasks.errors import NightlyError
from tasks.params import read_section
from tasks.study import (
    CODE,
    STUDIED,
    StudyParams,
    code_version,
    family,
    identity,
    l2_weight_decay,
    recipe,
    result,
    trials,
)
from tasks.study_figures import label
from tasks.study_report import PUBLISHED, make_headline, make_sentences, write_report
from tests.browser import Page
from tests.test_graph import closure
from tests.test_loop import memory_for

SMALL = StudyParams(
    networks=("plain20", "resnet20"),
    seeds=(1,),
    iterations=6,
    evaluate_every=2,
    batch_size=16,
    curve_test_images=10,
    final_train_images=20,
    checkpoint_seconds=0,
)
AUGMENT = AugmentParams(flip_horizontal=True, eraser={"p": 0.0})


# --- which trainings there are


def test_deep_networks_come_first_seed_by_seed(prepared):
    found = trials(prepared, StudyParams(networks=("plain20", "vgg16", "resnet56"), seeds=(1, 2)), AUGMENT)
    assert [(trial.seed, trial.network) for trial in found] == [
        *((seed, name) for seed in (1, 2) for name in ("resnet56", "plain20", "vgg16"))
    ]
    assert len({trial.digest for trial in found}) == 6


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"networks": ("resnet20", "plain56"), "seeds": (1, 5), "parallel": 3, "checkpoint_seconds": 7}, True),
        ({"doublings": 3, "vgg_learning_rate": 0.3, "warmup_iterations": 9, "precision": "float32"}, True),
        ({"iterations": 8}, False),
        ({"learning_rate": 0.3}, False),
        ({"curve_test_images": 11}, False),
    ],
)
def test_a_training_is_done_again_where_its_numbers_may_change(prepared, changes, same):
    before, after = (trials(prepared, params, AUGMENT)[-1] for params in (SMALL, SMALL.changed(**changes)))
    pick = {(t.network, t.seed): t.digest for t in trials(prepared, SMALL.changed(**changes), AUGMENT)}
    assert before.network == "resnet20"
    assert after.seed in (1, 5)
    assert (pick["resnet20", 1] == before.digest) is same


def test_other_data_and_augmentation_are_other_trainings(prepared, tmp_path):
    [first, *_] = trials(prepared, SMALL, AUGMENT)
    assert trials(prepared, SMALL, AUGMENT.changed(shift_pixels=2))[0].digest != first.digest
    facts = json.loads((prepared / "prepared.json").read_text())
    (tmp_path / "prepared.json").write_text(json.dumps(facts | {"data_digest": "other"}))
    assert trials(tmp_path, SMALL, AUGMENT)[0].digest != first.digest


def test_the_code_that_counts_is_what_training_imports(tmp_path, monkeypatch):
    reached = {Path(path).stem for path in closure("study_run") if path.endswith(".py")}
    # Reading, writing, waiting, reporting; and parameters, which are in the digest themselves.
    carrying_out = {"bundle", "checkpoint", "data", "device", "engines", "errors", "files", "images", "machine"}
    carrying_out |= {"params", "progress", "quantize", "recipe", "signals", "standing", "study", "weights", "mixing"}
    assert reached - carrying_out == set(CODE)


def test_comments_and_docstrings_do_not_count_as_code(tmp_path, monkeypatch):
    from tasks import study

    monkeypatch.setattr(study, "CODE", ("mine",))
    monkeypatch.setattr(study, "__file__", str(tmp_path / "study.py"))
    digests = []
    for text in ('"""Says."""\nx = 1\n', '"""Says more."""\n\nx = 1  # why\n', "x = 2\n"):
        (tmp_path / "mine.py").write_text(text)
        digests.append(code_version())
    assert digests[0] == digests[1] != digests[2]


def test_the_recipe_is_the_papers():
    params = StudyParams()
    found = recipe("resnet56", 3, params)
    assert (found.epochs * params.evaluate_every, found.batch_size, found.seed) == (64_000, 128, 3)
    assert (found.optimizer, found.momentum, found.nesterov, found.schedule) == ("sgd", 0.9, False, "steps")
    # Of L2 1e-4, each step with momentum 0.9 takes ten times as much in the long run.
    assert found.weight_decay == pytest.approx(1e-3)
    odd = StudyParams(weight_decay=3e-4, momentum=0.7)
    assert l2_weight_decay(recipe("plain20", 1, odd).model_dump()) == pytest.approx(3e-4)
    assert (found.warmup_epochs, found.learning_rate) == (0, 0.1)
    assert recipe("resnet110", 3, params).warmup_epochs * params.evaluate_every == 400
    assert recipe("vgg16", 3, params).learning_rate == 0.01
    assert identity("resnet34", 1, params, AUGMENT)["doublings"] == 2
    assert identity("resnet44", 1, params, AUGMENT)["doublings"] == 0
    assert {family(name) for name in STUDIED} == {"plain", "ResNet", "plain, upsampled", "ResNet, upsampled", "VGG"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{networks: [plain20, plain21]}", "vgg16, vgg19, but is ['plain20', 'plain21']"),
        ("{networks: [resnet50]}", "'study.networks': must be among resnet18, resnet34, plain18"),
        ("{seeds: [1, 1]}", "'study.seeds': must all be different"),
        ("{iterations: 100, evaluate_every: 30}", "iterations must be a multiple of evaluate_every (30)"),
    ],
)
def test_mistakes_in_the_parameters_are_named(tmp_path, section, message):
    (tmp_path / "params.yaml").write_text(f"study: {section}")
    with pytest.raises(NightlyError, match=re.escape(message)):
        read_section(tmp_path / "params.yaml", "study", StudyParams)


def test_presets_are_the_papers_study_and_a_quick_one():
    quick, full = (
        read_section(Path(f"presets/{name}.yaml"), "study", StudyParams) for name in ("study-quick", "study")
    )
    assert full.iterations * full.batch_size == 64_000 * 128
    assert set(PUBLISHED) <= set(full.networks)
    assert {"plain20", "resnet20"} < set(quick.networks)
    assert len(quick.seeds) > 1


# --- one training


def command(prepared: Path, folder: Path, network: str) -> list[str]:
    values = {"study": SMALL.model_dump(mode="json"), "augment": AUGMENT.model_dump(mode="json")}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    options = {"network": network, "seed": 1, "prepared": prepared, "results": folder / "runs", "threads": 1}
    options |= {"scratch": folder / "scratch", "params": folder / "params.yaml"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "tasks.study_run", *words]


def kill_at_a_checkpoint(process: subprocess.Popen, scratch: Path) -> None:
    """Send SIGKILL as soon as a checkpoint stands, in the middle of the training."""
    deadline = time.monotonic() + 200
    while not list(scratch.glob("*/[ab].npz")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_training_ends_with_the_numbers_of_one_that_nobody_disturbed(prepared, tmp_path):
    from tasks.study_run import run

    [_, trial] = trials(prepared, SMALL, AUGMENT)
    expected = run(prepared, tmp_path / "unbroken.json", tmp_path / "other", trial, SMALL, AUGMENT)
    words = command(prepared, tmp_path, "resnet20")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        kill_at_a_checkpoint(process, tmp_path / "scratch")
    assert result(tmp_path / "runs", trial) is None
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "going on from the checkpoint after iteration " in done.stdout
    assert "iteration 6 of 6: training error " in done.stdout
    found = result(tmp_path / "runs", trial)
    timeless = {"seconds_per_epoch": 0, "training_seconds": 0}
    curves = [[point | {"seconds": 0} for point in run["curve"]] for run in (found, expected)]
    assert curves[0] == [pytest.approx(point, abs=1e-4) for point in curves[1]]
    same = {**expected, **timeless, "curve": 0}
    assert {**found, **timeless, "curve": 0} == same
    assert [point["iteration"] for point in found["curve"]] == [2, 4, 6]
    assert (found["test_images"], found["curve_test_images"], found["final_train_images"]) == (33, 10, 20)
    # Table 6 of the paper says 0.27 million; with 3 classes in place of 10 it is 455 less than the 10-class network.
    assert found["parameters"] == 269_722 - 7 * 65
    assert not list((tmp_path / "scratch").glob("*/*.npz"))


def vgg_by_hand(convolutions: tuple[int, ...], size: int, classes: int) -> tuple[int, int]:
    """Return parameters and multiply-adds: stages of 3 × 3 convolutions with biases, each ending with a pooling."""
    parameters = products = 0
    channels = 3
    for filters, count in zip((64, 128, 256, 512, 512), convolutions, strict=True):
        for _ in range(count):
            kernel = 3 * 3 * channels * filters
            parameters, products, channels = parameters + kernel + filters, products + size**2 * kernel, filters
        size //= 2
    return parameters + (channels + 1) * classes, products + channels * classes


@pytest.mark.slow
def test_batches_computed_in_parts_are_on_record(prepared, tmp_path, monkeypatch):
    from tasks.study_run import run

    [_, trial] = trials(prepared, SMALL, AUGMENT)
    memory_for(monkeypatch, 8)
    run(prepared, tmp_path / trial.file_name, tmp_path / "scratch", trial, SMALL, AUGMENT)
    assert result(tmp_path, trial)["micro_batches"] == 2


def test_a_network_that_finds_all_classes_alike_is_wrong_as_often_as_a_guess():
    from tasks.study_run import EVALUATION_BATCH, errors

    class Uniform:
        def predict(self, batches, verbose):
            return np.full((len(batches) * EVALUATION_BATCH, 10), 0.1, np.float32)

    split = Split(np.zeros((20, 8, 8, 3), np.uint8), np.tile(np.eye(10, dtype=np.float32), (2, 1)))
    assert errors(Uniform(), split) == (0.9, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "convolutions"), [("vgg16", (2, 2, 3, 3, 3)), ("vgg19", (2, 2, 4, 4, 4))])
def test_vgg_networks_are_those_of_keras_without_batch_normalization(name, convolutions):
    import keras

    from tasks.resnet import multiply_adds
    from tasks.study_run import build_network

    normalization = {"mean": [120.0] * 3, "std": [60.0] * 3, "channel_order": "RGB"}
    network = build_network(name, SMALL, 32, 10, normalization)
    layers = network.get_layer(name).layers
    kernels = [layer.kernel.numpy() for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(kernels) == sum(convolutions)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    assert network.output.shape == (None, 10)
    parameters = sum(variable.numpy().size for variable in network.trainable_variables)
    assert (parameters, multiply_adds(network)) == vgg_by_hand(convolutions, 32, 10)
    # He et al. 2015 (arXiv 1502.01852), with the fan-in; Glorot's would deviate by a factor of about 0.7.
    deviations = [kernel.std() / (2 / kernel[..., 0].size) ** 0.5 for kernel in kernels]
    assert deviations == pytest.approx([1] * len(kernels), abs=0.06)


@pytest.mark.slow
def test_vgg_networks_need_images_of_32_px():
    from tasks.study_run import build_network

    with pytest.raises(NightlyError, match=r"vgg16 needs images of 32 px or more, but prepare.decode.size is 8"):
        build_network("vgg16", SMALL, 8, 10, {})


def test_an_interval_beyond_the_training_images_is_refused(prepared, tmp_path):
    from tasks.study_run import run

    params = SMALL.changed(iterations=60, evaluate_every=30)
    trial = trials(prepared, params, AUGMENT)[0]
    with pytest.raises(NightlyError, match=r"study.evaluate_every must be at most \d+ with study.batch_size 16"):
        run(prepared, tmp_path / "out.json", tmp_path / "scratch", trial, params, AUGMENT)


# --- the report


def made_up(network: str, seed: int, training: float, test: float | None = None) -> dict:
    curve = [
        {"iteration": 2 * i, "training_error": round(training + (3 - i) / 10, 6), "test_error": round(training, 6)}
        for i in (1, 2, 3)
    ]
    return {
        "network": network,
        "seed": seed,
        "digest": "0" * 12,
        "family": family(network),
        "depth": int(network[-2:]),
        "parameters": 269_722,
        "multiply_adds": 40_551_040,
        "train_images": 100,
        "test_images": 50,
        "curve_test_images": 10,
        "final_train_images": 20,
        "final_training_error": training - 0.01,
        "test_error": training if test is None else test,
        "top5_error": 0.1,
        "seconds_per_epoch": 12.5,
        "training_seconds": 30.0,
        "device": "a processor",
        "backend": "tensorflow",
        "precision": "float32",
        "parallel": 2,
        "recipe": identity(network, seed, SMALL, AUGMENT),
        "curve": curve,
    }


DEGRADED = [
    *(made_up("plain20", seed, 0.40 + seed / 100) for seed in (1, 2)),
    *(made_up("plain56", seed, 0.50 + seed / 100) for seed in (1, 2)),
    *(made_up("resnet20", seed, 0.38 + seed / 100) for seed in (1, 2)),
    *(made_up("resnet56", seed, 0.37 + seed / 50, 0.45) for seed in (1, 2)),
]


def number_in(text: str, percent: bool) -> tuple[float, float]:
    """Return the number that a text shows, and by how much rounding may have changed it."""
    digits = text.rstrip("%kMG").replace(",", "")
    scale = 0.01 if percent else {"%": 0.01, "k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1)
    return float(digits) * scale, 0.51 * 10 ** -len(digits.partition(".")[2]) * scale


def test_the_words_follow_from_the_numbers():
    plain, residual, shortcuts, depth = make_sentences(DEGRADED)
    assert plain == (
        "In the plain networks, plain-56 ends with a training error of 51.5% and plain-20 with 41.5%: 10.0 points "
        "more. Seeds of the same network differ by up to 1.0 points. So it is on the test images: 51.5% and 41.5%."
    )
    assert "0.5 points more. Seeds of the same network differ by up to 2.0 points: this may be chance." in residual
    assert shortcuts.startswith("At 56 layers, ResNet-56 ends with a training error of 40.0% and plain-56 with 51.5%")
    assert "may be chance" not in shortcuts
    assert depth == (
        "From 20 to 56 layers the training error changes by +10.0 points without shortcuts and by +0.5 with them."
    )
    assert make_headline(DEGRADED) == (
        "plain-56 trains 10.0 points worse than plain-20; ResNet-56 trains 0.5 points worse than ResNet-20 "
        "(within chance)"
    )


def test_seeds_that_are_apart_may_still_be_chance():
    shallow = [made_up("resnet20", 1, 0.398), made_up("resnet20", 2, 0.439)]
    deep, deeper = ([made_up("resnet56", seed, error + seed / 100) for seed in (1, 2)] for error in (0.43, 0.5))
    assert make_headline([*shallow, *deep]).endswith(" than ResNet-20 (within chance)")
    assert make_headline([*shallow, *deeper]).endswith(" than ResNet-20")


def test_one_seed_tells_nothing_about_chance():
    [sentence] = make_sentences([made_up("plain20", 1, 0.4), made_up("plain56", 1, 0.5, 0.3)])
    assert "With one seed nothing is known about chance" in sentence
    assert "On the test images it is the other way round: 30.0% and 40.0%." in sentence
    assert "than plain-20 (one seed)" in make_headline([made_up("plain20", 1, 0.4), made_up("plain56", 1, 0.5)])
    assert make_sentences([made_up("vgg16", 1, 0.4)]) == []


@pytest.mark.slow
def test_page_and_tables_hold_the_numbers_of_the_json(tmp_path):
    summary = write_report(DEGRADED, tmp_path / "report", "cifar10")
    found = json.loads((tmp_path / "report" / "study.json").read_text())
    networks = {row.pop("network"): row for row in found["networks"]}
    page = (tmp_path / "report" / "report.html").read_text()
    unshown = {"family", "depth"}
    known = {(name, key) for name, row in networks.items() for key, value in row.items() if value is not None}
    shown = [(*name.split(".")[1:], value, text) for name, value, text in Page(page).shown]
    assert {(network, metric) for network, metric, *_ in shown} == {pair for pair in known if pair[1] not in unshown}
    assert len(shown) == 4 * 9 + 2
    for network, metric, value, text in shown:
        assert float(value) == networks[network][metric]
        shown_number, rounding = number_in(text, percent=metric in ("test_error", "test_error_sd"))
        assert shown_number == pytest.approx(networks[network][metric], abs=rounding), (network, metric)
    with (tmp_path / "report" / "table.csv").open() as file:
        table = {row["network"]: row for row in csv.DictReader(file)}
    assert float(table["plain56"]["test_error"]) == networks["plain56"]["test_error"] == pytest.approx(0.515)
    assert networks["plain56"]["test_error_sd"] == pytest.approx(0.5**0.5 / 100)
    assert networks["resnet20"]["published_test_error"] == 0.0875
    assert networks["plain20"]["published_test_error"] is None
    for sentence in (*found["sentences"], found["headline"]):
        assert sentence in summary.markdown
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == 2
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"figure.png", "figure.svg", "figure-plain.png", "figure-resnet.svg", "curves.csv"} < names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "least", "most", "at_a_time", "beside"),
    [
        ([1] * 8, 1, 1, "", ""),
        ([2] * 8, 2, 2, "2 networks at a time, ", ", beside another training"),
        ([2, *[1] * 6, 3], 1, 3, "1 to 3 networks at a time, ", ", in part beside another training"),
    ],
)
def test_the_page_says_how_many_trained_at_a_time(tmp_path, parallel, least, most, at_a_time, beside):
    results = [{**run, "parallel": count} for run, count in zip(DEGRADED, parallel, strict=True)]
    write_report(results, tmp_path / "report", "cifar10")
    facts = json.loads((tmp_path / "report" / "study.json").read_text())["facts"]
    assert facts["parallel"] == [least, most]
    text = Page((tmp_path / "report" / "report.html").read_text()).text
    assert f"of training in all, without evaluation, {at_a_time}on a processor" in text
    assert f"those of the median interval{beside};" in text


@pytest.mark.slow
def test_the_page_names_networks_whose_batches_were_computed_in_parts(tmp_path):
    def said(name, results):
        write_report(results, tmp_path / name, "cifar10")
        return Page((tmp_path / name / "report.html").read_text()).text

    assert "For want of memory" not in said("all", DEGRADED)
    first = {**DEGRADED[0], "micro_batches": 4}
    words = said("parts", [first, *DEGRADED[1:]])
    assert f"For want of memory the batches of {label(first['network'])} were computed in parts" in words


@pytest.mark.slow
def test_the_page_shows_the_weight_decay_that_the_parameters_say(tmp_path):
    write_report(DEGRADED, tmp_path / "report", "cifar10")
    record = Page((tmp_path / "report" / "report.html").read_text()).text.partition("Record\n")[2]
    assert "weight decay (L2, of kernels only)0.0001\n" in record
    assert "0.001" not in record


@pytest.mark.slow
@pytest.mark.parametrize(("source", "there"), [("cifar10", True), ("folder", False), ("digits", False)])
def test_published_errors_stand_beside_those_of_the_same_data_only(tmp_path, source, there):
    summary = write_report(DEGRADED, tmp_path / "report", source)
    text = (tmp_path / "report" / "report.html").read_text()
    found = json.loads((tmp_path / "report" / "study.json").read_text())
    assert found["facts"]["source"] == source
    assert any(row["published_test_error"] for row in found["networks"]) is there
    for words in ("published", "Published", "CIFAR-10", "8.75%"):
        assert (words in Page(text).text) is there, words
    assert ("| published for CIFAR-10 |" in summary.markdown) is there
    assert ("8.75%" in summary.markdown) is there
    rows = [line for line in summary.markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(re.findall(r"<th scope=.col", text)) == len(
        re.findall("<t[hd]", text.partition("<tbody>\n")[2].partition("</tr>")[0])
    )
