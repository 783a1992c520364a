import io
import json
import re
import shutil
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks import evaluate as stage
from tasks.bundle import Limits
from tasks.calibration import apply_temperature
from tasks.errors import NightlyError
from tasks.evaluate import EvaluateParams, evaluate, summarize
from tasks.files import write_json
from tasks.heat import overlay

CLASSES = ["cat", "dog", "eel"]
TARGETS = np.array([0, 1, 2, 2])
KERAS = np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.0, 0.125, 0.875], [0.6, 0.3, 0.1]], np.float32)
OTHER = np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.0, 0.125, 0.875], [0.6, 0.3, 0.1]], np.float32)
SAME = {"agreement": 1.0, "accuracy_lost": 0.0, "max_difference": 0.0, "passed": True}
NAMES = ["cat/9.png", "dog/2.png", "eel/3.png", "eel/1.png"]
PREPARED = {
    "test_digest": "d1",
    "source": {"source": "folder"},
    "decode": {"size": 6},
    "counts": {"train": 1, "validation": 0, "test": 4},
    "left_out": {"duplicate": 1},
    "near_duplicates": {"pairs": 0, "across_splits": 0},
}
FACTS = {"model_id": "abc", "test_digest": "d1", "threshold": 0.6}


def measured(probabilities=None, targets=TARGETS, params=None, **facts):
    probabilities = probabilities or {"keras-float32": KERAS, "openvino-float32": OTHER}
    return summarize(probabilities, targets, CLASSES, params or EvaluateParams(), **{**FACTS, **facts})


def test_every_figure_of_four_images():
    # Confidences .7, .5, .875, .6 are alone in their bins; gaps .3, .5, .125, .6 average to .38125.
    # Confidence .6 in float32 is above the threshold of .6: three accepted, two of them right.
    found = measured().metrics
    found.pop("intervals")
    assert found == {
        "model_id": "abc",
        "test_digest": "d1",
        "test_images": 4,
        "mistakes": 1,
        "accuracy": 0.75,
        "accuracy_low": 0.300642,
        "accuracy_high": 0.954413,
        "confidence_level": 0.95,
        "top1_error": 0.25,
        "top5_error": 0.0,
        "macro_f1": 0.777778,
        "log_loss": round((-np.log([0.7, 0.5, 0.875, 0.1])).mean(), 6),
        "calibration_error": 0.38125,
        "temperature": 1.0,
        "uncalibrated": {"log_loss": round((-np.log([0.7, 0.5, 0.875, 0.1])).mean(), 6), "calibration_error": 0.38125},
        "threshold": 0.6,
        "accepted": 0.75,
        "accepted_accuracy": 0.666667,
        "per_class": {
            "cat": {"precision": 0.5, "recall": 1.0, "f1": 0.666667, "images": 1},
            "dog": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "images": 1},
            "eel": {"precision": 1.0, "recall": 0.5, "f1": 0.666667, "images": 2},
        },
        "engines": {
            "keras-float32": {**SAME, "accuracy": 0.75},
            "openvino-float32": {
                "accuracy": 0.5,
                "agreement": 0.75,
                "accuracy_lost": 0.25,
                "max_difference": 0.25,
                "passed": False,
            },
        },
    }


def test_every_headline_figure_has_an_interval_that_holds_it():
    found = measured().metrics
    assert found["intervals"].keys() == {
        *("top1_error", "top5_error", "macro_f1", "log_loss", "calibration_error", "accepted", "accepted_accuracy")
    }
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high, name
    # Wilson's of the errors is that of the accuracy in a mirror.
    assert found["intervals"]["top1_error"] == [round(1 - found[f"accuracy_{end}"], 6) for end in ("high", "low")]
    narrow = measured(params=EvaluateParams(confidence_level=0.5)).metrics["intervals"]
    for name in ("top1_error", "log_loss"):
        wide = found["intervals"][name]
        assert wide[0] < narrow[name][0] < narrow[name][1] < wide[1]


def test_all_figures_are_those_of_calibrated_probabilities():
    cooled = apply_temperature(KERAS, 0.5)
    found = measured({"keras-float32": KERAS}, temperature=0.5)
    plain = measured({"keras-float32": cooled})
    expected = {**plain.metrics, "temperature": 0.5}
    expected["uncalibrated"] = {name: measured().metrics[name] for name in ("log_loss", "calibration_error")}
    assert found.metrics == expected
    assert found.metrics["log_loss"] != expected["uncalibrated"]["log_loss"]
    assert found.metrics["calibration_error"] != expected["uncalibrated"]["calibration_error"]
    pd.testing.assert_frame_equal(found.predictions, plain.predictions)


def test_an_engine_passes_within_the_bundles_limits():
    assert measured(limits=Limits(minimum_agreement=0.75, maximum_loss=0.25)).metrics["engines"]["openvino-float32"][
        "passed"
    ]
    for limits in (Limits(minimum_agreement=0.76, maximum_loss=1), Limits(minimum_agreement=0, maximum_loss=0.24)):
        assert not measured(limits=limits).metrics["engines"]["openvino-float32"]["passed"]


def test_a_confidence_equal_to_the_threshold_is_accepted_and_the_next_one_is_not():
    assert measured(threshold=0.875).metrics["accepted"] == 0.25
    assert measured(threshold=np.nextafter(0.875, 1)).metrics["accepted"] == 0.0
    assert measured(threshold=np.nextafter(0.875, 1)).metrics["accepted_accuracy"] == 0.0


def test_without_a_threshold_its_figures_are_absent():
    assert not {"threshold", "accepted", "accepted_accuracy"} & measured(threshold=None).metrics.keys()


def test_a_class_without_images_has_scores_of_zero():
    scores = measured({"keras-float32": KERAS}, np.array([0, 1, 1, 0])).metrics["per_class"]["eel"]
    assert scores == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "images": 0}


def test_predictions_have_a_row_per_image():
    table = measured().predictions
    assert list(table.columns) == ["index", "target", "label", "correct", "confidence", "p_0", "p_1", "p_2"]
    assert table["target"].tolist() == ["cat", "dog", "eel", "eel"]
    assert table["label"].tolist() == ["cat", "dog", "eel", "cat"]
    assert table["correct"].tolist() == [True, True, True, False]
    np.testing.assert_array_equal(table[["p_0", "p_1", "p_2"]].to_numpy(), KERAS)


def test_mistakes_come_by_falling_and_hits_by_rising_confidence():
    found = measured({"keras-float32": KERAS}, np.array([1, 1, 2, 2]))
    assert found.mistakes == [0, 3]
    assert found.hits == [1, 2]
    assert measured({"keras-float32": KERAS}, np.array([1, 1, 2, 2]), EvaluateParams(pictures=1)).mistakes == [0]


def test_a_diverged_model_is_one_clear_line():
    broken = KERAS.copy()
    broken[1:3] = np.nan
    with pytest.raises(NightlyError, match=r"keras-float32 .* NaN or infinity for 2 of 4 test images"):
        measured({"keras-float32": broken})


def test_probabilities_of_another_shape_are_refused():
    with pytest.raises(NightlyError, match=r"must give probabilities \(4, 3\), but gave \(4, 2\)"):
        measured({"keras-float32": KERAS[:, :2]})


class TableEngine:
    """Answers from the first pixel of each image, which holds the image's row in a table."""

    batch_size = 3

    def __init__(self, name, table):
        self.name, self._table = name, table

    def stream(self, batches):
        for batch in batches:
            assert len(batch) <= self.batch_size
            yield self._table[batch[:, 0, 0, 0]]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A bundle and prepared data as the earlier stages write them, and engines that answer from a table."""
    prepared, exported = tmp_path / "prepared", tmp_path / "exported"
    images = np.zeros((4, 6, 6, 3), np.uint8)
    images[:, 0, 0, 0] = range(4)
    (prepared / "test").mkdir(parents=True)
    np.save(prepared / "test" / "images.npy", images)
    np.save(prepared / "test" / "targets.npy", np.eye(3, dtype=np.float32)[TARGETS])
    write_json(prepared / "classes.json", CLASSES)
    write_json(prepared / "prepared.json", PREPARED)
    pd.DataFrame(
        {
            "name": ["eel/1.png", "cat/9.png", "dog/2.png", "dog/9.png", "eel/3.png", "cat/8.png"],
            "class": ["eel", "cat", "dog", "dog", "eel", "cat"],
            "status": ["ok", "ok", "ok", "ok", "ok", "duplicate"],
            "split": ["test", "test", "test", "train", "test", "test"],
            "position": [3, 0, 1, 0, 2, -1],
        }
    ).to_parquet(prepared / "manifest.parquet")
    exported.mkdir()
    (exported / "model.keras").touch()
    (exported / "engines" / "openvino").mkdir(parents=True)
    (exported / "engines" / "openvino" / "model.xml").touch()
    (exported / "history.csv").write_text(
        "epoch,loss,accuracy,val_loss,val_accuracy,learning_rate,seconds\n1,1.5,0.5,1.4,0.55,0.001,3.2\n"
    )
    write_json(exported / "bundle.json", bundle_facts())
    tables = {"keras-float32": KERAS, "openvino-float32": OTHER}
    monkeypatch.setattr(stage, "open_engine", lambda bundle, name, batch_size: TableEngine(name, tables[name]))
    monkeypatch.setattr(stage, "load_keras_model", lambda bundle: bundle.classes)
    monkeypatch.setattr(stage, "GradCam", LabelHeat)
    return tmp_path


class LabelHeat:
    """Finds that everything in images of class 0 speaks for it, and nothing in others."""

    def __init__(self, classes):
        self._classes = classes

    def heat(self, images, classes):
        assert images.shape[1:] == (6, 6, 3)
        return np.stack([np.full((6, 6), float(label == 0), np.float32) for label in classes])


def bundle_facts(**changes):
    return {
        "format": 1,
        "id": "abc",
        "created": "2025-11-23T15:45:01+00:00",
        "classes": CLASSES,
        "decode": {"size": 6},
        "normalization": {"mode": "unit", "mean": [0, 0, 0], "std": [255, 255, 255], "channel_order": "RGB"},
        "parameters": {"model": {"pool": "avg"}, "train": {"epochs": 1}, "augment": {}},
        "data_digest": "d0",
        "test_digest": "d1",
        "libraries": {"keras": "3.12.0"},
        "training": {"seconds": 3.2, "kept_epoch": 1},
        "engines": {"openvino-float32": {"agreement": 0.9, "max_difference": 0.2, "offered": True}},
        "threshold": 0.6,
        **changes,
    }


def run(workspace, out="evaluation"):
    return evaluate(workspace / "exported", workspace / "prepared", workspace / out, EvaluateParams())


def test_evaluate_writes_what_it_measured(workspace):
    summary = run(workspace)
    out = workspace / "evaluation"
    assert (summary.model_id, summary.accuracy, summary.test_images) == ("abc", 0.75, 4)
    assert summary.report == out / "report.html"
    assert json.loads((out / "metrics.json").read_text()) == measured().metrics
    assert (out / "plots" / "confusion.csv").read_text() == "actual,predicted\ncat,cat\ndog,dog\neel,eel\neel,cat\n"
    assert (out / "plots" / "calibration.csv").read_text() == (
        "confidence,accuracy,images\n0.5,1.0,1\n0.6,0.0,1\n0.7,1.0,1\n0.875,1.0,1\n"
    )
    assert (out / "plots" / "classes.csv").read_text() == (
        "class,precision,recall,f1,images\ncat,0.5,1.0,0.666667,1\ndog,1.0,1.0,1.0,1\neel,1.0,0.5,0.666667,2\n"
    )
    table = measured().predictions
    table.insert(1, "name", NAMES)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "predictions.parquet"), table, check_dtype=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "metrics.json",
        "plots",
        "predictions.parquet",
        "report.html",
    ]


def test_temperature_and_limits_are_the_bundles(workspace):
    facts = bundle_facts(temperature=0.5, limits={"minimum_agreement": 0.7, "maximum_loss": 0.3})
    write_json(workspace / "exported" / "bundle.json", facts)
    run(workspace)
    found = json.loads((workspace / "evaluation" / "metrics.json").read_text())
    limits = Limits(minimum_agreement=0.7, maximum_loss=0.3)
    assert found == measured(temperature=0.5, limits=limits).metrics
    assert found["engines"]["openvino-float32"]["passed"]


def test_an_engine_that_is_not_run_is_named_with_the_reason(workspace, monkeypatch):
    refused = {"agreement": 0.9012, "accuracy_lost": 0.05, "max_difference": 0.5, "offered": False}
    foreign = {"agreement": 0.9987, "accuracy_lost": 0.0, "max_difference": 0.1, "offered": True}
    engines = {**bundle_facts()["engines"], "openvino-int8": refused, "openvino-bfloat16": foreign}
    monkeypatch.setattr(stage, "available", lambda bundle, name: name == "openvino-float32")
    write_json(workspace / "exported" / "bundle.json", bundle_facts(engines=engines))
    run(workspace)
    assert "openvino-int8" not in json.loads((workspace / "evaluation" / "metrics.json").read_text())["engines"]
    words = "openvino-int8 is not offered and was not measured: same label as Keras on 90.12% of the validation images"
    page = (workspace / "evaluation" / "report.html").read_text()
    assert words in page
    assert "openvino-bfloat16 was not measured, because this processor does not run it: same label as Keras" in page


def test_the_same_model_gives_the_same_bytes(workspace):
    run(workspace, "first")
    run(workspace, "second")
    for name in ("metrics.json", "plots/confusion.csv", "plots/calibration.csv", "report.html"):
        assert (workspace / "first" / name).read_bytes() == (workspace / "second" / name).read_bytes()


def test_the_pages_matrix_and_pictures_are_those_of_the_files_beside_it(workspace):
    run(workspace)
    out = workspace / "evaluation"
    page = (out / "report.html").read_text()
    plots, table = pd.read_csv(out / "plots" / "confusion.csv"), pd.read_parquet(out / "predictions.parquet")
    counts = pd.crosstab(plots["actual"], plots["predicted"]).reindex(index=CLASSES, columns=CLASSES, fill_value=0)
    cells = re.findall(r'<td class="cell[^>]*>(?:<a[^>]*>)?(\d+)', page)
    assert [int(count) for count in cells] == counts.to_numpy().ravel().tolist()
    tiles = re.findall(r'title="test image (\d): ([^;]*); (\w+) ([\d.]+)%[^"]*"><i[^>]*></i>(\d+)%<', page)
    assert sorted(tiles) == [
        (str(i), row["name"], row["label"], f"{row['confidence']:.1%}"[:-1], f"{row['confidence']:.0%}"[:-1])
        for i, row in table.iterrows()
    ]
    shown = re.findall(r'title="test image (\d): ([^"]*)"><div.*?<figcaption>(.*?)</figcaption>', page, re.DOTALL)
    assert [(index, name) for index, name, _ in shown] == [(str(i), NAMES[i]) for i in (3, 1, 0, 2)]
    for index, _, caption in shown:
        for label, percent in re.findall(r"<bdi>(\w+)</bdi><span>([\d.]+)%", caption):
            assert f"{table[f'p_{CLASSES.index(label)}'][int(index)]:.1%}" == f"{percent}%"


def test_each_picture_has_the_heat_map_of_its_label_beside_it(workspace):
    run(workspace)
    page = (workspace / "evaluation" / "report.html").read_text()
    pairs = re.findall(
        r'alt="Test image (\d)">(?:<img src="([^"]*)" alt="What spoke for cat"|<span class="nothing")', page
    )
    assert [(index, bool(source)) for index, source in pairs] == [("3", True), ("1", False), ("0", True), ("2", False)]
    for index, source in pairs:
        if source:
            found = np.asarray(Image.open(io.BytesIO(b64decode(source.partition(",")[2]))))
            plain = np.zeros((6, 6, 3), np.uint8)
            plain[0, 0, 0] = int(index)
            np.testing.assert_array_equal(found, overlay(plain, np.ones((6, 6), np.float32)))


def test_the_model_in_service_is_in_the_report_and_in_nothing_else(workspace):
    run(workspace, "first")
    models = workspace / "models"
    (models / "registry" / "old").mkdir(parents=True)
    shutil.copytree(workspace / "first", models / "registry" / "old" / "evaluation")
    write_json(models / "registry" / "old" / "evaluation" / "metrics.json", measured(model_id="old").metrics)
    write_json(models / "champion.json", {"id": "old"})
    evaluate(workspace / "exported", workspace / "prepared", workspace / "second", EvaluateParams(), models)
    assert "old was in service when this was evaluated" in (workspace / "second" / "report.html").read_text()
    assert "in service when" not in (workspace / "first" / "report.html").read_text()
    assert (workspace / "first" / "metrics.json").read_bytes() == (workspace / "second" / "metrics.json").read_bytes()


def test_other_test_data_than_the_model_was_trained_beside_is_said_in_the_report(workspace):
    run(workspace)
    assert "The test split has changed" not in (workspace / "evaluation" / "report.html").read_text()
    write_json(workspace / "prepared" / "prepared.json", {**PREPARED, "test_digest": "d2"})
    run(workspace)
    assert "The test split has changed" in (workspace / "evaluation" / "report.html").read_text()
    assert json.loads((workspace / "evaluation" / "metrics.json").read_text())["test_digest"] == "d2"


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog", "fox"], r"only one of them has 'fox', 'eel'"),
        (["dog", "cat", "eel"], r"their order differs"),
    ],
)
def test_other_classes_are_refused(workspace, classes, message):
    write_json(workspace / "prepared" / "classes.json", classes)
    with pytest.raises(NightlyError, match=message):
        run(workspace)
    assert not (workspace / "evaluation").exists()


def test_another_image_size_is_refused(workspace):
    write_json(workspace / "exported" / "bundle.json", bundle_facts(decode={"size": 8}))
    with pytest.raises(NightlyError, match=r"takes images \(8, 8, 3\), but the test split has \(6, 6, 3\)"):
        run(workspace)


def test_an_empty_test_split_is_refused(workspace):
    np.save(workspace / "prepared" / "test" / "images.npy", np.zeros((0, 6, 6, 3), np.uint8))
    np.save(workspace / "prepared" / "test" / "targets.npy", np.zeros((0, 3), np.float32))
    with pytest.raises(NightlyError, match="must hold at least one image"):
        run(workspace)


def test_the_command_line_reads_its_section(workspace, monkeypatch, capsys):
    (workspace / "params.yaml").write_text("evaluate:\n  pictures: 0\n")
    options = {"--exported": "exported", "--prepared": "prepared", "--out": "evaluation", "--params": "params.yaml"}
    arguments = [word for option, name in options.items() for word in (option, str(workspace / name))]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    stage.main()
    assert "accuracy 0.7500 on 4 test images" in capsys.readouterr().out
    assert "Pictures worth a look" not in (workspace / "evaluation" / "report.html").read_text()
