import itertools

import numpy as np
import pytest

import tasks.export
from tasks import metrics
from tasks.bundle import load_bundle
from tasks.calibration import apply_temperature
from tasks.choice import choose_engine, this_machine
from tasks.engines import ENGINES, REFERENCE, open_engine, read_openvino, supports_bfloat16, write_openvino
from tasks.errors import NightlyError
from tasks.export import ExportParams, confidence_threshold, export, images_per_second, write_reference
from tasks.tally import Tally

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
    assert bundle.machine == this_machine()
    assert 0 < bundle.threshold <= 1
    assert (exported / "history.csv").is_file()


def test_int8_is_small_and_close(exported, prepared):
    bundle = load_bundle(exported)
    assert bundle.engines["openvino-int8"]["offered"]
    assert bundle.engines["openvino-int8"]["max_difference"] > bundle.engines["openvino-float32"]["max_difference"]
    kinds = [node.get_type_name() for node in read_openvino(bundle.engine_file("openvino-int8")).get_ordered_ops()]
    assert "FakeQuantize" in kinds
    images = np.load(prepared / "test" / "images.npy")
    reference = open_engine(bundle, REFERENCE).probabilities(images)
    found = open_engine(bundle, "openvino-int8").probabilities(images)
    np.testing.assert_allclose(found, reference, atol=0.1)


def test_temperature_and_threshold_are_those_of_keras_on_the_validation_split(exported, prepared):
    bundle = load_bundle(exported)
    images = np.load(prepared / "validation" / "images.npy")
    targets = np.load(prepared / "validation" / "targets.npy").argmax(axis=1)
    raw = open_engine(bundle, REFERENCE).probabilities(images)
    assert bundle.temperature == tasks.export.fit_temperature(raw, targets) != 1
    scaled = apply_temperature(raw, bundle.temperature)
    assert bundle.threshold == confidence_threshold(scaled, targets, ExportParams().accepted_precision)
    assert metrics.log_loss(targets, scaled) < metrics.log_loss(targets, raw)


def test_the_reference_counts_the_validation_split(exported, prepared):
    bundle = load_bundle(exported)
    images = np.load(prepared / "validation" / "images.npy")
    tally = Tally.load(bundle.reference_file)
    raw, features = open_engine(bundle, REFERENCE).run(images)
    scaled = apply_temperature(raw, bundle.temperature)
    assert tally.count == len(images)
    np.testing.assert_array_equal(tally.labels, np.bincount(scaled.argmax(axis=1), minlength=3))
    np.testing.assert_allclose(tally.features[0], features.sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(tally.confidence[0], scaled.max(axis=1).sum(), rtol=1e-5)


def test_a_reference_in_blocks_is_one_at_once(tmp_path):
    random = np.random.default_rng(0)
    images, features = random.integers(0, 256, (10, 4, 4, 3), np.uint8), random.random((10, 5), np.float32)
    probabilities = np.full((10, 2), 0.5, np.float32)
    tallies = []
    for block in (3, 10):
        write_reference(tmp_path / "reference.npz", images, features, probabilities, block)
        tallies.append(Tally.load(tmp_path / "reference.npz"))
    assert tallies[0].count == tallies[1].count == 10
    np.testing.assert_allclose(tallies[0].images, tallies[1].images)
    np.testing.assert_allclose(tallies[0].features, tallies[1].features)


def test_an_engine_that_disagrees_in_float32_is_not_written(candidate, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "agreement", lambda reference, found: 0.5)
    with pytest.raises(NightlyError, match=r"openvino-float32 is too far from keras-float32: .* 50\.00%.* is 0\.995 "):
        export(candidate, prepared, tmp_path / "out", ExportParams(int8=False))
    assert not (tmp_path / "out").exists()


def test_int8_that_disagrees_is_written_down_and_removed(candidate, prepared, tmp_path, monkeypatch):
    def wrong(model, images):
        import keras

        pixels = keras.Input((8, 8, 3), dtype="uint8")
        x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(pixels))
        classifier = keras.Model(pixels, keras.layers.Dense(3, activation="softmax", kernel_initializer="zeros")(x))
        write_openvino(classifier, tmp_path / "wrong.xml")
        return read_openvino(tmp_path / "wrong.xml")

    monkeypatch.setattr(tasks.export, "quantize", wrong)
    summary = export(candidate, prepared, tmp_path / "out", ExportParams())
    bundle = load_bundle(tmp_path / "out")
    assert bundle.engines == summary.engines
    assert not bundle.engines["openvino-int8"]["offered"]
    assert bundle.engines["openvino-int8"]["agreement"] < 0.6
    assert bundle.engines["openvino-int8"]["accuracy_lost"] > 0.3
    assert sorted(path.name for path in (tmp_path / "out" / "engines").iterdir()) == ["openvino"]
    with pytest.raises(NightlyError, match="int8 is not offered"):
        choose_engine(bundle, "openvino", "int8")


def test_what_is_not_wanted_is_not_written(candidate, prepared, tmp_path):
    export(candidate, prepared, tmp_path / "out", ExportParams(int8=False))
    assert list(load_bundle(tmp_path / "out").engines) == [name for name in EXPECTED if name != "openvino-int8"]
    export(candidate, prepared, tmp_path / "out", ExportParams(openvino=False))
    bundle = load_bundle(tmp_path / "out")
    assert list(bundle.engines) == [REFERENCE]
    with pytest.raises(NightlyError, match="has no engine openvino-float32"):
        open_engine(bundle, "openvino-float32")


def test_the_speed_is_that_of_the_best_run(monkeypatch):
    class Engine:
        calls = 0

        def probabilities(self, images):
            self.calls += 1

    engine, times = Engine(), itertools.accumulate([0.0, 0.4, 0.0, 0.05, 0.0, 0.2])
    monkeypatch.setattr(tasks.export.time, "perf_counter", lambda: next(times))
    assert images_per_second(engine, np.zeros((1000, 1))) == pytest.approx(256 / 0.05)
    assert engine.calls == 3


def test_threshold_is_the_smallest_that_is_right_often_enough():
    confidence = np.array([0.95, 0.9, 0.8, 0.7, 0.6])
    right = np.array([1, 1, 1, 0, 1])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    targets = 1 - right
    assert confidence_threshold(probabilities, targets, 1.0) == 0.8
    assert confidence_threshold(probabilities, targets, 0.8) == 0.6
    assert confidence_threshold(probabilities, 1 - targets, 1.0) == 1.0


def test_threshold_counts_all_images_of_equal_confidence():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1]])
    targets = np.array([0, 1])
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
