"""The features' cache: what is computed, what is found again, and what a kill or a full disk leaves."""

import functools
import os
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tasks.features
import tests.chance
from tasks.device import prepare_device
from tasks.engines import supports_bfloat16
from tasks.errors import Interrupted, NightlyError
from tasks.features import CPU_BATCH, FeatureSource, choose_precision, in_bfloat16, make_room
from tasks.files import read_json

SIZE, FEATURES = 8, 6
noise = functools.partial(tests.chance.noise, height=SIZE, width=SIZE)


def make_extractor(seed: int = 0):
    """A nested backbone with a BatchNormalization that has seen something, as in the real one."""
    import keras

    keras.utils.set_random_seed(seed)
    x = inner = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(FEATURES, 3, name="conv")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    backbone = keras.Model(inner, keras.layers.ReLU()(x), name="backbone")
    backbone.get_layer("norm").moving_mean.assign([0.1] * FEATURES)
    images = keras.Input((SIZE, SIZE, 3), dtype="uint8", name="images")
    x = backbone(keras.layers.Rescaling(1 / 64)(images))
    return keras.Model(images, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="extractor")


@pytest.fixture(scope="module")
def extractor():
    return make_extractor()


@pytest.fixture
def computed(monkeypatch):
    """The number of images in each batch that any engine computes."""
    batches = []

    def counting(engine):
        stream = engine.stream

        def counted(given):
            for part in stream(given):
                batches.append(len(part))
                yield part

        engine.stream = counted
        return engine

    for name in ("OpenVINOEngine", "KerasEngine"):
        real = getattr(tasks.features, name)
        monkeypatch.setattr(tasks.features, name, lambda *args, real=real: counting(real(*args)))
    return batches


def source(extractor, cache, precision="float32", identity=None, **options) -> FeatureSource:
    return FeatureSource(extractor, cache, identity=identity or {"backbone": "tiny"}, precision=precision, **options)


def expected(extractor, images) -> np.ndarray:
    return np.asarray(extractor.predict_on_batch(images))


def test_float32_features_are_those_of_keras(extractor, tmp_path):
    images = noise(2 * CPU_BATCH + 3)
    found = source(extractor, tmp_path).features(images, "some")
    assert (found.dtype, found.shape) == (np.float32, (len(images), FEATURES))
    assert isinstance(found, np.memmap)
    np.testing.assert_allclose(found, expected(extractor, images), atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lower_precisions_are_close(extractor, tmp_path, precision):
    if precision == "bfloat16" and not supports_bfloat16():
        with pytest.raises(NightlyError, match="needs a processor with bfloat16 instructions"):
            source(extractor, tmp_path, precision)
        return
    images = noise(40)
    reference = expected(extractor, images)
    features = source(extractor, tmp_path, precision, calibration=images)
    found = features.features(images, "some")
    assert features.engine == f"OpenVINO in {precision}"
    difference = np.abs(found - reference)
    assert 0 < difference.max() < 0.05 * np.abs(reference).max()


def test_int8_is_the_same_for_the_same_seed(extractor, tmp_path):
    images = noise(30)
    first, again = (
        source(extractor, tmp_path / name, "int8", calibration=images).features(images, "some") for name in "ab"
    )
    np.testing.assert_array_equal(first, again)


def test_precisions_of_this_machine():
    automatic = "bfloat16" if supports_bfloat16() else "float32"
    assert choose_precision("auto", gpu=False) == automatic
    assert [choose_precision(asked, gpu=True) for asked in ("auto", "int8", "float32")] == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]


def test_int8_without_images_is_one_line(extractor, tmp_path):
    with pytest.raises(NightlyError, match="int8 needs training images"):
        source(extractor, tmp_path, "int8", calibration=noise(0))


def test_a_second_run_computes_nothing(extractor, tmp_path, computed):
    images = noise(20)
    first = source(extractor, tmp_path)
    expected = np.array(first.features(images, "some"))
    assert (sum(computed), first.computed) == (20, 20)
    second = source(extractor, tmp_path)
    np.testing.assert_array_equal(second.features(images, "some"), expected)
    assert (sum(computed), second.computed) == (20, 0)
    assert second.seconds == {"build": 0.0, "features": 0.0}
    (entry,) = tmp_path.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["facts.json", "features.npy"]


@pytest.mark.slow
def test_anything_that_changes_features_is_computed_anew(extractor, tmp_path, computed, monkeypatch):
    images = noise(CPU_BATCH)

    def misses(images=images, extractor=extractor, **options) -> bool:
        before = len(computed)
        source(extractor, tmp_path, **options).features(images, "some")
        return len(computed) > before

    assert misses()
    assert not misses()
    changed = images.copy()
    changed[-1, -1, -1, -1] ^= 1
    assert misses(images=changed)
    assert misses(images=images[::-1])
    assert misses(images=images[:-1])
    assert misses(identity={"backbone": "other"})
    assert misses(identity={"backbone": "tiny", "doublings": 1})
    assert misses(extractor=make_extractor(seed=1))
    assert misses(precision="int8", calibration=images)
    assert misses(precision="int8", calibration=changed)
    assert not misses(precision="int8", calibration=images)
    assert not misses()
    real = tasks.features.importlib.metadata.version
    monkeypatch.setattr(tasks.features.importlib.metadata, "version", lambda name: f"{real(name)}.1")
    assert misses()


def test_a_statistic_of_batch_normalization_is_a_weight(tmp_path, computed):
    images, extractor = noise(CPU_BATCH), make_extractor()
    source(extractor, tmp_path).features(images, "some")
    extractor.get_layer("backbone").get_layer("norm").moving_variance.assign([2.0] * FEATURES)
    found = source(extractor, tmp_path).features(images, "some")
    assert len(computed) == 2
    np.testing.assert_allclose(found, expected(extractor, images), atol=1e-4)


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours handles it."""


def killed_after(batches: int, monkeypatch) -> None:
    real = tasks.features.OpenVINOEngine

    def dying(*args):
        engine = real(*args)
        stream = engine.stream

        def dies(given):
            for number, part in enumerate(stream(given)):
                if number == batches:
                    raise Killed
                yield part

        engine.stream = dies
        return engine

    monkeypatch.setattr(tasks.features, "OpenVINOEngine", dying)


@pytest.mark.parametrize(("batches", "kept"), [(1, 0), (2, 2), (5, 4)])
def test_a_killed_computation_goes_on_where_it_was(extractor, tmp_path, computed, monkeypatch, batches, kept):
    images = noise(6 * CPU_BATCH + 1)
    unbroken = np.array(source(extractor, tmp_path / "unbroken").features(images, "some"))
    monkeypatch.setattr(tasks.features, "FLUSH_ROWS", 2 * CPU_BATCH)
    with monkeypatch.context() as patch:
        killed_after(batches, patch)
        with pytest.raises(Killed):
            source(extractor, tmp_path / "cache").features(images, "some")
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.endswith(".unfinished")
    with (left / "features.npy").open("ab") as file:  # what a power cut may leave after the last synchronized row
        file.write(b"\xff" * 1000)
    computed.clear()
    resumed = source(extractor, tmp_path / "cache")
    np.testing.assert_array_equal(resumed.features(images, "some"), unbroken)
    assert sum(computed) == resumed.computed == len(images) - kept * CPU_BATCH
    (entry,) = (tmp_path / "cache").iterdir()
    assert (entry / "features.npy").read_bytes() == next((tmp_path / "unbroken").glob("*/features.npy")).read_bytes()


def test_a_kill_before_the_last_rename_costs_nothing(extractor, tmp_path, computed, monkeypatch):
    images = noise(CPU_BATCH)

    def die(path, value):
        if path.name == "facts.json":
            raise Killed
        write_json(path, value)

    write_json = tasks.features.write_json
    with monkeypatch.context() as patch:
        patch.setattr(tasks.features, "write_json", die)
        with pytest.raises(Killed):
            source(extractor, tmp_path).features(images, "some")
    computed.clear()
    found = source(extractor, tmp_path).features(images, "some")
    assert computed == []
    np.testing.assert_allclose(found, expected(extractor, images), atol=1e-4)


def test_a_signal_ends_it_after_the_batch_and_keeps_what_there_is(extractor, tmp_path, computed, monkeypatch):
    images = noise(3 * CPU_BATCH)
    real = tasks.features.OpenVINOEngine

    def signalled(*args):
        engine = real(*args)
        stream = engine.stream

        def stopping(given):
            for number, part in enumerate(stream(given)):
                if number == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield part

        engine.stream = stopping
        return engine

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(tasks.features, "OpenVINOEngine", signalled)
        with pytest.raises(Interrupted, match="stopped by SIGTERM after 16 of 24 some images"):
            source(extractor, tmp_path).features(images, "some")
    assert signal.getsignal(signal.SIGTERM) == before
    computed.clear()
    found = source(extractor, tmp_path).features(images, "some")
    assert computed == [CPU_BATCH]
    np.testing.assert_allclose(found, expected(extractor, images), atol=1e-4)


def test_a_full_disk_is_found_before_any_work(extractor, tmp_path, computed, monkeypatch):
    images = noise(CPU_BATCH)
    source(extractor, tmp_path).features(images, "some")
    before = sorted(tmp_path.rglob("*"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(tasks.features.shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(NightlyError, match=r"the features need \d+ bytes in .*, but only 100 are free"):
        source(extractor, tmp_path).features(noise(CPU_BATCH, seed=1), "others")
    assert sorted(tmp_path.rglob("*")) == before
    assert len(computed) == 1


def test_a_disk_that_fills_up_on_the_way_loses_nothing(extractor, tmp_path, computed, monkeypatch):
    images = noise(4 * CPU_BATCH)
    monkeypatch.setattr(tasks.features, "FLUSH_ROWS", CPU_BATCH)
    calls = []

    def full(path, value):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write_json(path, value)

    write_json = tasks.features.write_json
    with monkeypatch.context() as patch:
        patch.setattr(tasks.features, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            source(extractor, tmp_path).features(images, "some")
    computed.clear()
    found = source(extractor, tmp_path).features(images, "some")
    assert sum(computed) == 2 * CPU_BATCH
    np.testing.assert_allclose(found, expected(extractor, images), atol=1e-4)


@pytest.mark.parametrize("damage", ["truncated", "no features", "no facts"])
def test_a_damaged_entry_is_computed_again(extractor, tmp_path, damage):
    images = noise(CPU_BATCH)
    first = np.array(source(extractor, tmp_path).features(images, "some"))
    (entry,) = tmp_path.iterdir()
    if damage == "truncated":
        os.truncate(entry / "features.npy", 150)
    else:
        (entry / ("features.npy" if damage == "no features" else "facts.json")).unlink()
    again = source(extractor, tmp_path)
    np.testing.assert_array_equal(again.features(images, "some"), first)
    assert again.computed == CPU_BATCH


def test_the_cache_keeps_what_was_used_last_and_all_of_this_run(extractor, tmp_path, monkeypatch):
    splits = [noise(CPU_BATCH, seed=seed) for seed in range(4)]
    for number, images in enumerate(splits[:3]):
        before = set(tmp_path.iterdir())
        source(extractor, tmp_path).features(images, "some")
        (entry,) = set(tmp_path.iterdir()) - before
        os.utime(entry / "facts.json", (number, number))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) // 3
    monkeypatch.setattr(tasks.features, "CACHE_BYTES", 3 * size + 100)
    source(extractor, tmp_path).features(splits[0], "found again")  # from now on it is the one used last
    source(extractor, tmp_path).features(splits[3], "new")
    assert len(list(tmp_path.iterdir())) == 3
    again = source(extractor, tmp_path)
    for images in (splits[0], splits[2], splits[3]):
        again.features(images, "still there")
    assert again.computed == 0
    monkeypatch.setattr(tasks.features, "CACHE_BYTES", 0)
    both = source(extractor, tmp_path)
    both.features(splits[0], "found")
    both.features(splits[1], "computed")
    assert both.computed == CPU_BATCH
    assert len(list(tmp_path.iterdir())) == 2


def test_unfinished_entries_of_others_count_too(tmp_path):
    left = tmp_path / ".0123.unfinished"
    left.mkdir()
    (left / "features.npy").write_bytes(bytes(1000))
    make_room(tmp_path, 10, keep=())
    assert left.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.features, "CACHE_BYTES", 1005)
        make_room(tmp_path, 10, keep={left})
        assert left.exists()
        make_room(tmp_path, 10, keep=())
    assert not left.exists()


def test_features_that_are_not_finite_are_named(extractor, tmp_path):
    import keras

    endless = keras.Model(extractor.input, keras.layers.Rescaling(float("inf"))(extractor.output))
    with pytest.raises(NightlyError, match="the features of training image 0 are not finite in OpenVINO in float32"):
        source(endless, tmp_path).features(noise(3), "training")


def test_facts_are_kept_with_the_features(extractor, tmp_path):
    source(extractor, tmp_path).features(noise(3), "some")
    (entry,) = tmp_path.iterdir()
    facts = read_json(entry / "facts.json")
    assert facts["identity"] == {"backbone": "tiny"}
    assert facts["precision"] == "float32"
    assert facts["engine"]["openvino"]
    assert facts["images_per_second"] > 0


def test_a_gpu_computes_with_keras(extractor, tmp_path, monkeypatch, computed):
    device = replace(prepare_device(), kind="gpu")
    monkeypatch.setattr(tasks.features, "prepare_device", lambda: device)
    images = noise(10)
    reference = expected(extractor, images)
    exact = source(extractor, tmp_path, "float32")
    np.testing.assert_allclose(exact.features(images, "some"), reference, atol=1e-5)
    half = source(extractor, tmp_path, "auto")
    found = half.features(images, "some")
    assert (exact.engine, half.engine) == ("Keras in float32", "Keras in bfloat16")
    assert computed == [10, 10]
    assert 0 < np.abs(found - reference).max() < 0.02 * np.abs(reference).max()


def test_the_copy_in_bfloat16_leaves_the_model_alone(extractor):
    copy = in_bfloat16(extractor)
    assert copy.get_layer("backbone").get_layer("conv").compute_dtype == "bfloat16"
    assert extractor.get_layer("backbone").get_layer("conv").compute_dtype == "float32"
    for mine, theirs in zip(copy.get_weights(), extractor.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


KILLED = """
import sys
from pathlib import Path
from tests.test_features import make_extractor, noise, source
import tasks.features, time
tasks.features.FLUSH_ROWS = 8
real = tasks.features.OpenVINOEngine.stream
def slow(self, batches):
    for part in real(self, batches):
        time.sleep(0.1)
        print("batch", flush=True)
        yield part
tasks.features.OpenVINOEngine.stream = slow
source(make_extractor(), Path(sys.argv[1])).features(noise(400), "some")
"""


@pytest.mark.slow
def test_kill_minus_nine_and_again(tmp_path, computed):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache")]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        for _ in range(7):
            assert child.stdout.readline() == "batch\n"
        child.kill()
    extractor = make_extractor()
    unbroken = np.array(source(extractor, tmp_path / "unbroken").features(noise(400), "some"))
    computed.clear()
    found = source(extractor, tmp_path / "cache").features(noise(400), "some")
    np.testing.assert_array_equal(found, unbroken)
    assert 0 < sum(computed) <= 400 - 5 * CPU_BATCH


@pytest.mark.slow
@pytest.mark.parametrize("call", ["tasks.engines.supports_bfloat16()", "tasks.engines.import_openvino(); import nncf"])
def test_no_telemetry(call, tmp_path):
    program = f"import sys, tasks.features; {call}; print('Telemetry' in dir(sys.modules['openvino_telemetry']))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HOME": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "False\n", done.stderr
    assert not (tmp_path / "intel").exists()
