import itertools

import numpy as np
import pytest

from tasks.bundle import load_bundle
from tasks.engines import ENGINES, REFERENCE, batched, open_engine, supports_bfloat16
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


@pytest.mark.parametrize("name", EXPECTED)
def test_engines_agree_with_keras_on_the_test_split(exported, prepared, name):
    bundle = load_bundle(exported)
    images = np.load(prepared / "test" / "images.npy", mmap_mode="r")
    reference = open_engine(bundle, REFERENCE).probabilities(images)
    found = open_engine(bundle, name).probabilities(images)
    assert found.shape == (len(images), 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference, atol=0.02 if "bfloat16" in name else 1e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_results_do_not_depend_on_what_else_is_in_the_batch(exported, prepared, name):
    images = np.load(prepared / "test" / "images.npy")
    engine = open_engine(load_bundle(exported), name, batch_size=8)
    together = engine.probabilities(images)
    for count in (1, 3, 8):
        np.testing.assert_array_equal(engine.probabilities(images[:count]), together[:count])


def test_a_stream_keeps_order_over_many_short_batches(exported, prepared):
    images = np.load(prepared / "test" / "images.npy")
    engine = open_engine(load_bundle(exported), "openvino-float32", batch_size=4)
    sizes = [4, 1, 3, 2, 4, 4, 1]
    starts = np.cumsum([0, *sizes])
    parts = list(engine.stream(images[a:b] for a, b in itertools.pairwise(starts)))
    assert [len(part) for part in parts] == sizes
    np.testing.assert_array_equal(np.concatenate(parts), engine.probabilities(images[: starts[-1]]))


def test_a_batch_that_is_too_large_is_refused(exported, prepared):
    images = np.load(prepared / "test" / "images.npy")
    engine = open_engine(load_bundle(exported), REFERENCE, batch_size=4)
    with pytest.raises(ValueError, match="may hold 4 images, but holds 5"):
        list(engine.stream([images[:5]]))


def test_batched_cuts_a_stream_of_images():
    images = [np.full((2, 2, 3), number, np.uint8) for number in range(5)]
    assert [len(batch) for batch in batched(images, 2)] == [2, 2, 1]


def test_an_unknown_engine_is_refused_with_the_nearest_name(exported):
    with pytest.raises(NightlyError, match="did you mean 'openvino-float32'"):
        open_engine(load_bundle(exported), "openvino-float")


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
