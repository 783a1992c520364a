import numpy as np
import pytest

from tasks.bundle import load_bundle
from tasks.engines import ENGINES, REFERENCE, open_engine, supports_bfloat16
from tasks.errors import NightlyError
from tasks.export import ExportParams, confidence_threshold, export

EXPECTED = [name for name in ENGINES if name != "openvino-bfloat16" or supports_bfloat16()]


def test_the_bundle_is_complete_and_says_how_engines_agree(candidate, exported):
    bundle = load_bundle(exported)
    assert bundle.id == load_bundle(candidate).id
    assert list(bundle.engines) == EXPECTED
    reference = bundle.engines[REFERENCE]
    assert (reference["agreement"], reference["max_difference"], reference["offered"]) == (1.0, 0.0, True)
    assert all(facts["images_per_second"] > 0 for facts in bundle.engines.values())
    assert bundle.engines["openvino-float32"]["agreement"] == 1.0
    assert bundle.engines["openvino-float32"]["max_difference"] < 1e-4
    assert 0 < bundle.threshold <= 1
    assert (exported / "history.csv").is_file()


def test_an_engine_that_disagrees_is_not_written(candidate, prepared, tmp_path, monkeypatch):
    import tasks.export

    monkeypatch.setattr(tasks.export, "agreement", lambda reference, found: 0.5)
    with pytest.raises(NightlyError, match=r"agrees with keras-float32 on 0\.5000.*minimum_agreement is 0\.995"):
        export(candidate, prepared, tmp_path / "out", ExportParams())
    assert not (tmp_path / "out").exists()


def test_without_openvino_only_keras_is_offered(candidate, prepared, tmp_path):
    export(candidate, prepared, tmp_path / "out", ExportParams(openvino=False))
    bundle = load_bundle(tmp_path / "out")
    assert list(bundle.engines) == [REFERENCE]
    with pytest.raises(NightlyError, match="has no OpenVINO engine"):
        open_engine(bundle, "openvino-float32")


def test_threshold_is_the_smallest_that_is_right_often_enough():
    confidence = np.array([0.95, 0.9, 0.8, 0.7, 0.6])
    right = np.array([1, 1, 1, 0, 1])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    targets = np.stack([right, 1 - right], axis=1)
    assert confidence_threshold(probabilities, targets, 1.0) == 0.8
    assert confidence_threshold(probabilities, targets, 0.8) == 0.6
    assert confidence_threshold(probabilities, 1 - targets, 1.0) == 1.0


def test_threshold_counts_all_images_of_equal_confidence():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1]])
    targets = np.array([[1, 0], [0, 1]])
    assert confidence_threshold(probabilities, targets, 1.0) == 1.0


def test_what_is_no_bundle_is_named(tmp_path, exported):
    with pytest.raises(NightlyError, match=r"is no model bundle: it has no bundle\.json"):
        load_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text((exported / "bundle.json").read_text())
    with pytest.raises(NightlyError, match=r"is incomplete: it has no model\.keras"):
        load_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text('{"format": 7}')
    with pytest.raises(NightlyError, match="format must be 1, but is 7"):
        load_bundle(tmp_path)
    (tmp_path / "bundle.json").write_text("[1")
    with pytest.raises(NightlyError, match="is damaged"):
        load_bundle(tmp_path)
