"""The recipes, from prepared data to a bundle."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
import yaml

from tasks.augmentation import AugmentParams
from tasks.bundle import load_bundle, load_keras_model
from tasks.classifier import ModelParams
from tasks.errors import EXIT_INTERRUPTED, NightlyError
from tasks.recipe import ProbeParams, TrainParams
from tasks.train import Scratch, train

MODEL = ModelParams(batch_normalization_momentum=0.5)
QUICK = TrainParams(
    epochs=2, batch_size=16, learning_rate=0.01, probe=ProbeParams(epochs=3, batch_size=32, precision="float32")
)


def backbone_weights(bundle_path):
    model = load_keras_model(load_bundle(bundle_path))
    return next(layer for layer in model.layers if layer.name == "tiny").get_weights()


@pytest.fixture
def run(prepared, augmented, tiny_backbone, tmp_path):
    def go(name: str, params: TrainParams, **options):
        scratch = options.pop("scratch", Scratch.under(tmp_path / "scratch"))
        model = options.pop("model", MODEL)
        train(prepared, augmented, tmp_path / name, params, model, AugmentParams(), scratch)
        return load_bundle(tmp_path / name)

    return go


@pytest.mark.slow
def test_a_probe_trains_the_head_alone_and_saves_the_full_model(run, prepared, tmp_path):
    bundle = run("probe", QUICK.changed(recipe="probe"))
    other = run("other", QUICK.changed(recipe="probe", probe={"epochs": 1, "precision": "float32"}))
    for one, another in zip(backbone_weights(bundle.path), backbone_weights(other.path), strict=True):
        np.testing.assert_array_equal(one, another)
    assert bundle.id != other.id, "the heads differ"
    features = bundle.training["features"]
    assert features["computed"] == features["images"] > 0
    assert other.training["features"]["computed"] == 0, "they were there already"
    assert list(pd.read_csv(bundle.path / "history.csv").epoch) == [1, 2, 3]
    images = np.load(prepared / "validation" / "images.npy")
    targets = np.load(prepared / "validation" / "targets.npy")
    found = load_keras_model(bundle).predict(images, verbose=0)
    accuracy = (found.argmax(axis=1) == targets.argmax(axis=1)).mean()
    assert accuracy == pytest.approx(bundle.training["validation_accuracy"], abs=1e-6)


@pytest.mark.slow
def test_probe_then_finetune_begins_where_the_probe_ended(run):
    params = QUICK.changed(recipe="probe-then-finetune", learning_rate=1e-9, optimizer="sgd", keep="last", epochs=1)
    bundle = run("both", params)
    probed = run("probe", params.changed(recipe="probe"))
    head = [
        load_keras_model(load_bundle(path)).get_layer("probabilities").get_weights()
        for path in (bundle.path, probed.path)
    ]
    for one, another in zip(*head, strict=True):
        np.testing.assert_allclose(one, another, atol=1e-5)
    assert bundle.training["probe"]["epochs"] == 3
    assert bundle.training["epochs"] == 1


def test_a_warm_start_begins_with_the_model_in_service(run, candidate, tmp_path, capsys):
    scratch = Scratch(tmp_path / "checkpoints", tmp_path / "features", candidate)
    params = QUICK.changed(warm_start=True, optimizer="sgd", learning_rate=1e-12, epochs=1)
    bundle = run("warm", params, scratch=scratch)
    champion = load_bundle(candidate)
    assert bundle.training["warm_start"] == champion.id
    assert f"warm start from model {champion.id}" in capsys.readouterr().out
    kernels = [load_keras_model(found).get_layer("probabilities").get_weights()[0] for found in (bundle, champion)]
    np.testing.assert_allclose(*kernels, atol=1e-6)


def test_a_model_in_service_that_does_not_fit_is_left_alone(run, candidate, tmp_path, capsys):
    scratch = Scratch(tmp_path / "checkpoints", tmp_path / "features", candidate)
    bundle = run(
        "cold", QUICK.changed(warm_start=True, epochs=1), scratch=scratch, model=MODEL.changed(head_units=(5,))
    )
    assert "warm_start" not in bundle.training
    assert "has other classes or layers; starting without it" in capsys.readouterr().out


def test_a_warm_start_without_a_model_in_service_says_so(run, capsys):
    run("cold", QUICK.changed(warm_start=True, epochs=1))
    assert "there is no model in service yet" in capsys.readouterr().out


def test_low_resolution_first_ends_in_a_model_of_full_resolution(run):
    bundle = run("steps", QUICK.changed(low_resolution_epochs=1), model=MODEL.changed(doublings=3))
    assert bundle.training["kept_epoch"] == 2
    model = load_keras_model(bundle)
    assert {"double_1", "double_2", "double_3"} <= {layer.name for layer in model.layers}


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ({"doublings": 0}, r"needs model\.doublings of 1 or more, but it is 0"),
        ({"pool": "flatten"}, r"needs model\.pool: avg, but it is flatten"),
        ({"doublings": 2}, r"model\.doublings 1 of 8 px give 16 px, but resnet50 needs 32 px"),
    ],
)
def test_a_model_without_a_lower_resolution_is_refused_before_training(run, model, what, capsys):
    with pytest.raises(NightlyError, match=what):
        run("no", QUICK.changed(low_resolution_epochs=1), model=MODEL.changed(**model))
    assert "epoch 1" not in capsys.readouterr().out


def test_all_that_strengthens_a_recipe_together(run):
    params = QUICK.changed(
        optimizer="sgd",
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        ema_momentum=0.9,
        label_smoothing=0.1,
        weight_decay=0.001,
        head_learning_rate=0.1,
        freeze_batch_normalization=True,
        warmup_epochs=0.5,
        early_stopping_epochs=2,
        steps_per_execution=3,
        data_on_device=True,
        precision="mixed_bfloat16",
    )
    bundle = run("all", params)
    assert bundle.training["precision"] == "mixed_bfloat16"
    assert np.isfinite(pd.read_csv(bundle.path / "history.csv").to_numpy()).all()


def test_checkpoints_go_when_the_run_is_over(run, tmp_path):
    run("done", QUICK.changed(checkpoint_seconds=0))
    assert list((tmp_path / "scratch" / "checkpoints").iterdir()) == []


def test_a_batch_that_the_devices_cannot_share_is_refused(prepared, augmented, tmp_path, monkeypatch):
    from tasks import train as module
    from tasks.device import Device

    monkeypatch.setattr(module, "prepare_device", lambda *_, **__: Device("tensorflow", "gpu", "two", 2))
    with pytest.raises(NightlyError, match=r"train\.batch_size must be a multiple of the 2 devices, but is 15"):
        train(prepared, augmented, tmp_path / "o", QUICK.changed(batch_size=15), MODEL, AugmentParams())


DEVICES = """
    import sys
    from pathlib import Path
    if sys.argv[4:] == ["tensorflow"]:
        import tensorflow as tf
        [cpu] = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    from tasks.augmentation import AugmentParams
    from tasks.classifier import ModelParams
    from tasks.recipe import TrainParams
    from tasks.train import train
    from tests.conftest import small_network
    params = TrainParams(epochs=2, batch_size=16, optimizer="sgd", learning_rate=0.01, ema_momentum=0.9, keep="last")
    model = ModelParams(batch_normalization_momentum=0.5)
    none = AugmentParams(flip_horizontal=False, shift_pixels=0, eraser={"p": 0})
    with small_network():  # with batch normalization; a deeper one takes a minute to be traced twice
        train(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), params, model, none)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_the_model_that_one_trains(prepared, augmented, tmp_path, backend):
    found = {}
    for count in (1, 2):
        environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONWARNINGS": "ignore"}
        if count == 2 and backend == "jax":
            environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        command = [sys.executable, "-c", textwrap.dedent(DEVICES), prepared, augmented, tmp_path / str(count)]
        command += [backend] if count == 2 and backend == "tensorflow" else []
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        found[count] = load_bundle(tmp_path / str(count))
        assert found[count].training["devices"] == count
    histories = [pd.read_csv(bundle.path / "history.csv").drop(columns="seconds") for bundle in found.values()]
    pd.testing.assert_frame_equal(*histories, atol=1e-3)
    for one, two in zip(*(load_keras_model(bundle).get_weights() for bundle in found.values()), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-3)


@pytest.mark.slow
def test_the_stage_saves_on_a_signal_and_goes_on(prepared, augmented, tmp_path):
    """The command as DVC runs it, stopped in mid-training and run again: the model of a run that was not stopped."""
    params = tmp_path / "params.yaml"
    sections = {
        "train": {
            "epochs": 16,
            "batch_size": 16,
            "optimizer": "sgd",
            "learning_rate": 0.01,
            "checkpoint_seconds": 3600,
        },
        "model": {"backbone": "resnet20", "doublings": 0},
        "augment": {"shift_pixels": 1},
    }
    params.write_text(yaml.safe_dump(sections))

    def start(name: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tasks.train", "--prepared", prepared, "--augmented", augmented]
        command += ["--out", tmp_path / name, "--scratch", tmp_path / f"scratch-{name}", "--models", tmp_path]
        command += ["--params", params]
        return subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
        )

    def until(child: "subprocess.Popen[str]", sign: str) -> None:
        assert child.stdout
        lines = []
        while sign not in (line := child.stdout.readline()):
            lines.append(line)
            assert line, f"ended early: {lines}"

    with start("whole") as whole:
        until(whole, "trained model")
    for number, moment in ((signal.SIGTERM, "epoch 2/16"), (signal.SIGINT, "epoch 5/16")):
        with start("cut") as cut:
            until(cut, moment)
            time.sleep(0.05)
            cut.send_signal(number)
            until(cut, f"interrupted: training stopped by {number.name} after epoch")
        assert cut.returncode == EXIT_INTERRUPTED
        assert not (tmp_path / "cut").exists()
    with start("cut") as again:
        until(again, "going on from the checkpoint after epoch")
        until(again, "trained model")
    weights = [load_keras_model(load_bundle(tmp_path / name)).get_weights() for name in ("whole", "cut")]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
