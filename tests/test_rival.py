import numpy as np
import pandas as pd
import pytest

from tasks.files import write_json
from tasks.judge import Evaluated
from tasks.rival import read_rival

TARGETS = np.array(["cat", "cat", "dog", "dog"], dtype=object)


def metrics(model_id, accuracy, test_digest="d1"):
    scores = {name: {"recall": accuracy} for name in ("cat", "dog")}
    return {"model_id": model_id, "accuracy": accuracy, "test_digest": test_digest, "per_class": scores}


CHALLENGER = Evaluated(metrics("new", 0.75), TARGETS, np.array([True, True, True, False]))


@pytest.fixture
def models(tmp_path):
    evaluation = tmp_path / "registry" / "old" / "evaluation"
    evaluation.mkdir(parents=True)
    write_json(evaluation / "metrics.json", metrics("old", 0.5))
    table = pd.DataFrame({"target": TARGETS, "correct": [False, True, False, True]})
    table.to_parquet(evaluation / "predictions.parquet")
    write_json(tmp_path / "champion.json", {"id": "old"})
    return tmp_path


def test_the_model_in_service_is_compared_image_by_image(models):
    found = read_rival(models, CHALLENGER)
    assert (found.id, found.obstacle, found.metrics) == ("old", "", metrics("old", 0.5))
    assert {name: found.comparison[name] for name in ("gain", "now_right", "now_wrong")} == {
        "gain": 0.25,
        "now_right": 2,
        "now_wrong": 1,
    }


def test_a_model_is_not_compared_with_itself_nor_with_nothing(models, tmp_path):
    assert read_rival(models, Evaluated(metrics("old", 0.5))) is None
    assert read_rival(tmp_path / "nowhere", CHALLENGER) is None


def test_figures_of_another_test_set_are_shown_and_not_compared(models):
    found = read_rival(models, Evaluated(metrics("new", 0.75, "d2")))
    assert found.comparison is None
    assert "another test set" in found.obstacle
    assert found.metrics["accuracy"] == 0.5


def test_a_damaged_pointer_or_evaluation_is_an_obstacle(models):
    evaluation = models / "registry" / "old" / "evaluation"
    for name in ("predictions.parquet", "metrics.json"):
        (evaluation / name).write_text("<<<<<<< HEAD")
        found = read_rival(models, CHALLENGER)
        assert (found.id, found.metrics, found.obstacle) == ("old", {}, f"{evaluation} is damaged")
    (models / "champion.json").write_text("<<<<<<< HEAD")
    found = read_rival(models, CHALLENGER)
    assert (found.id, found.metrics, found.comparison) == (None, {}, None)
    assert "champion.json is damaged: put a model in service with 'nightly rollback ID'" in found.obstacle


def test_a_model_in_service_that_was_not_fetched_is_named(models):
    (models / "registry" / "old.dvc").touch()
    (models / "registry" / "old").rename(models / "elsewhere")
    found = read_rival(models, CHALLENGER)
    assert (found.id, found.metrics, found.comparison) == ("old", {}, None)
    assert "dvc pull" in found.obstacle
