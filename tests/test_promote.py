"""The registry, the champion's pointer and the ledger."""

import json
import os
from pathlib import Path

import pytest

from tasks.bundle import MODEL_FILE, load_bundle
from tasks.errors import NightlyError
from tasks.files import read_json, write_json
from tasks.promote import (
    Verdict,
    history,
    hold,
    promote,
    register,
    rollback,
    rollback_target,
)
from tasks.registry import champion_id, champion_path, registered
from tests.miniature import export, metrics


@pytest.fixture
def models(tmp_path):
    """A models directory with two registered models, none in service."""
    for model_id in ("old", "new"):
        register(*export(tmp_path / model_id, model_id), tmp_path / "models" / "registry")
    return tmp_path / "models"


GOOD = Verdict("promote", ["better"])


# --- the registry


def test_a_registered_model_is_a_copy_with_its_evaluation(tmp_path):
    exported, evaluation = export(tmp_path, "m1")
    assert register(exported, evaluation, tmp_path / "registry") == "m1"
    files = {str(path.relative_to(tmp_path / "registry")) for path in (tmp_path / "registry").rglob("*.*")}
    assert files == {
        "m1/bundle.json",
        "m1/card.md",
        "m1/model.keras",
        "m1/evaluation/metrics.json",
        "m1/evaluation/predictions.parquet",
        "m1/evaluation/report.html",
    }


def test_a_registered_models_engines_have_the_evidence_of_the_test_split(tmp_path):
    exported, evaluation = export(tmp_path, "m1")
    validation = {"agreement": 1.0, "offered": True}
    engines = {name: dict(validation) for name in ("keras-float32", "openvino-float32", "openvino-int8")}
    engines["openvino-bfloat16"] = {"agreement": 0.9, "offered": False}
    load_bundle(exported).changed(engines=engines).save()
    before = (exported / "bundle.json").read_bytes()
    found = {name: {"agreement": 0.999, "passed": name != "openvino-int8"} for name in engines}
    del found["keras-float32"]
    write_json(evaluation / "metrics.json", {**metrics("m1", 0.9), "engines": found})
    register(exported, evaluation, tmp_path / "registry")
    registered_bundle = load_bundle(tmp_path / "registry" / "m1")
    assert registered_bundle.engines == {
        "keras-float32": validation,
        "openvino-float32": {**validation, "test": {"agreement": 0.999, "passed": True}},
        "openvino-int8": {"agreement": 1.0, "offered": False, "test": {"agreement": 0.999, "passed": False}},
        "openvino-bfloat16": {"agreement": 0.9, "offered": False, "test": {"agreement": 0.999, "passed": True}},
    }
    assert registered_bundle.id == "m1"
    assert (exported / "bundle.json").read_bytes() == before, "what DVC made stays as it is"


def test_a_registered_model_is_never_changed(tmp_path):
    exported, evaluation = export(tmp_path, "m1")
    register(exported, evaluation, tmp_path / "registry")
    (exported / MODEL_FILE).write_text("other weights")
    assert register(exported, evaluation, tmp_path / "registry") == "m1"
    assert (tmp_path / "registry" / "m1" / MODEL_FILE).read_text() == "weights of m1"


def test_a_half_copied_model_never_has_its_name(tmp_path, monkeypatch):
    exported, evaluation = export(tmp_path, "m1")
    (evaluation / "report.html").unlink()
    with pytest.raises(FileNotFoundError):
        register(exported, evaluation, tmp_path / "registry")
    assert list((tmp_path / "registry").iterdir()) == []


def test_an_evaluation_of_another_model_is_refused(tmp_path):
    exported, evaluation = export(tmp_path, "m1")
    write_json(evaluation / "metrics.json", metrics("m0", 0.9))
    with pytest.raises(NightlyError, match=r"is about model m0, but .*exported holds m1"):
        register(exported, evaluation, tmp_path / "registry")


def test_models_that_only_dvc_still_holds_are_known_and_named_as_missing(models):
    (models / "registry" / "pruned.dvc").touch()
    assert registered(models) == ["new", "old", "pruned"]
    with pytest.raises(NightlyError, match=r"pruned is missing: fetch it with 'dvc pull .*pruned\.dvc'"):
        promote(models, "pruned", GOOD)


def test_an_unknown_model_is_answered_with_the_nearest(models):
    with pytest.raises(NightlyError, match=r"no model 'odl' in the registry: did you mean 'old'\?"):
        promote(models, "odl", GOOD)


# --- the champion and the ledger


def test_without_a_champion_the_error_says_what_to_do(models):
    assert champion_id(models) is None
    with pytest.raises(NightlyError, match="no model yet: run 'nightly retrain', or name one with --model"):
        champion_path(models)


def test_promoting_moves_the_pointer_and_writes_the_ledger(models):
    promote(models, "old", Verdict("promote", ["the first"]))
    promote(models, "new", GOOD, champion_metrics=metrics("old", 0.8))
    assert champion_path(models) == models / "registry" / "new"
    first, second = history(models)
    assert (first.action, first.id, first.champion_before, first.champion) == ("promote", "old", None, None)
    assert (second.id, second.champion_before, second.reasons) == ("new", "old", ["better"])
    assert second.challenger == metrics("new", 0.9)
    assert second.champion == metrics("old", 0.8)
    assert second.data_digest == "data-of-new"
    assert read_json(models / "champion.json") == {"id": "new", "promoted": second.time, "reason": "better"}


def test_what_the_judge_found_is_in_the_ledger_and_lines_from_before_it_are_read(models):
    found = {"gain": 0.01, "now_right": 3, "now_wrong": 2, "p": 1.0, "interval": [-0.02, 0.04], "classes": []}
    promote(models, "old", GOOD)
    hold(models, Verdict("hold", ["worse"], found), metrics("x", 0.1), metrics("old", 0.9), "d1")
    promote(models, "new", Verdict("promote", ["better"], found), metrics("old", 0.8))
    assert [entry.comparison for entry in history(models)] == [None, found, found]
    ledger = models / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in lines:
        del line["comparison"]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(entry.id, entry.comparison) for entry in history(models)] == [("old", None), ("x", None), ("new", None)]


def test_holding_is_written_too_and_changes_nothing(models):
    promote(models, "old", GOOD)
    hold(models, Verdict("hold", ["worse"]), metrics("x", 0.1), metrics("old", 0.9), "d1")
    assert champion_id(models) == "old"
    entry = history(models)[-1]
    assert (entry.action, entry.id, entry.champion_before, entry.data_digest) == ("hold", "x", "old", "d1")


def test_rolling_back_twice_goes_further_back_and_not_forward_again(models, tmp_path):
    register(*export(tmp_path / "third", "third"), models / "registry")
    for model_id in ("old", "new", "third"):
        promote(models, model_id, GOOD)
    for expected in ("new", "old"):
        assert rollback_target(models) == expected
        rollback(models, rollback_target(models), "by hand")
        assert champion_id(models) == expected
    with pytest.raises(NightlyError, match="old is the first champion"):
        rollback_target(models)
    assert [entry.action for entry in history(models)] == ["promote"] * 3 + ["rollback"] * 2


def test_there_is_nothing_to_roll_back_before_the_first_champion(models):
    with pytest.raises(NightlyError, match="no model is in service"):
        rollback_target(models)


def test_a_kill_at_any_step_leaves_the_old_or_the_new_champion_in_service(models, monkeypatch):
    """Raise at each system call that changes the disk, one after the other, and finish the promotion afterwards."""
    promote(models, "old", GOOD)
    kills = 0
    for step in range(100):
        with monkeypatch.context() as patch:
            count = 0

            def wrap(function, step=step):
                def call(*args, **kwargs):
                    nonlocal count
                    count += 1
                    if count == step + 1:
                        raise KeyboardInterrupt
                    return function(*args, **kwargs)

                return call

            for name in ("fsync", "open", "mkdir"):
                patch.setattr(os, name, wrap(getattr(os, name)))
            patch.setattr(Path, "replace", wrap(Path.replace))
            patch.setattr(Path, "open", wrap(Path.open))
            patch.setattr(Path, "write_text", wrap(Path.write_text))
            try:
                promote(models, "new", GOOD)
            except KeyboardInterrupt:
                kills += 1
                assert champion_id(models) in ("old", "new")
                assert champion_path(models).is_dir()
                assert all(entry.id in ("old", "new") for entry in history(models))
                continue
        break
    assert kills >= 6
    assert champion_id(models) == "new"
    # However often the promotion was tried, the way back leads to the model before it.
    assert rollback_target(models) == "old"


def test_a_torn_last_line_is_survived_and_the_next_one_is_whole(models, caplog):
    promote(models, "old", GOOD)
    ledger = models / "ledger.jsonl"
    whole = ledger.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        ledger.write_bytes(whole + whole[:length])
        entry = promote(models, "new", GOOD)
        lines = ledger.read_text().splitlines()
        assert len(lines) == 3
        assert json.loads(lines[2]) == vars(entry)
        assert history(models)[-1] == entry
    assert "line 2 is damaged and was left out" in caplog.text


def test_a_reason_with_bytes_that_are_no_utf8_is_kept_as_what_can_be_printed(models):
    promote(models, "old", Verdict("promote", ["caf\udce9"]))
    rollback(models, "new", "\ud800 by hand")
    assert [entry.reasons for entry in history(models)] == [[r"caf\udce9"], [r"\ud800 by hand"]]
    assert read_json(models / "champion.json")["reason"] == r"\ud800 by hand"


def test_a_damaged_pointer_is_named_and_mended_by_a_rollback(models):
    promote(models, "old", GOOD)
    (models / "champion.json").write_text("<<<<<<< HEAD")
    with pytest.raises(NightlyError, match=r"champion\.json is damaged: .*nightly rollback ID"):
        champion_path(models)
    rollback(models, "old", "mended")
    assert champion_id(models) == "old"
