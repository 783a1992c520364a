import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from tasks.augmentation import AugmentParams
from tasks.bundle import load_bundle, load_keras_model, model_id
from tasks.classifier import ModelParams
from tasks.errors import NightlyError
from tasks.images import DecodePolicy
from tasks.recipe import TrainParams
from tasks.train import train

QUICK = TrainParams(epochs=1, batch_size=16, learning_rate=0.01)


def test_training_learns_the_colors_and_says_how(candidate):
    history = pd.read_csv(candidate / "history.csv")
    assert list(history.columns) == [
        "epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"
    ]  # fmt: skip
    assert list(history.epoch) == list(range(1, 9))
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    bundle = load_bundle(candidate)
    assert bundle.training["validation_accuracy"] > 0.9
    best = history.loc[history.val_loss.idxmin()]
    assert bundle.training["kept_epoch"] == best.epoch
    assert bundle.training["validation_accuracy"] == pytest.approx(best.val_accuracy)


def test_the_kept_weights_are_those_of_the_best_epoch(candidate, prepared):
    model = load_keras_model(load_bundle(candidate))
    images = np.load(prepared / "validation" / "images.npy")
    targets = np.load(prepared / "validation" / "targets.npy")
    probabilities = model.predict(images, verbose=0)
    loss = -np.log((probabilities * targets).sum(axis=1)).mean()
    history = pd.read_csv(candidate / "history.csv")
    assert loss == pytest.approx(history.val_loss.min(), rel=1e-3)


def test_the_saved_model_is_for_inference_only(candidate):
    model = load_keras_model(load_bundle(candidate))
    assert not model.compiled
    names = {type(layer).__name__ for layer in model.layers}
    assert not names & {"RandomErasing", "RandomShift", "RandomFlip"}
    assert model.get_layer("normalize").get_config()["mean"]


def test_the_bundle_holds_what_prediction_needs(candidate, prepared):
    bundle = load_bundle(candidate)
    facts = json.loads((prepared / "prepared.json").read_text())
    assert bundle.classes == ["blue", "green", "red"]
    assert bundle.decode == DecodePolicy(**facts["decode"])
    assert bundle.normalization == facts["normalization"]
    assert bundle.data_digest == facts["data_digest"]
    assert bundle.parameters["train"]["epochs"] == 8
    assert bundle.libraries["keras"]
    found = {name: bundle.training[f"{name}_images"] for name in ("training", "validation")}
    assert found == {"training": facts["counts"]["train"], "validation": facts["counts"]["validation"]}
    assert len(bundle.id) == 12


@pytest.mark.slow
def test_a_clean_process_gives_the_same_probabilities(candidate, prepared, tmp_path):
    images = np.load(prepared / "test" / "images.npy")
    here = load_keras_model(load_bundle(candidate)).predict(images, verbose=0)
    code = (
        "import sys, numpy as np; from pathlib import Path; from tasks.bundle import load_bundle, load_keras_model;"
        "model = load_keras_model(load_bundle(Path(sys.argv[1])));"
        "np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))"
    )
    found = tmp_path / "found.npy"
    arguments = [candidate, prepared / "test" / "images.npy", found]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(found), here, atol=1e-6)


def test_mixed_precision_trains_and_saves_float32(prepared, augmented, tiny_backbone, tmp_path):
    params = QUICK.changed(precision="mixed_bfloat16")
    train(prepared, augmented, tmp_path / "out", params, ModelParams(), AugmentParams())
    model = load_keras_model(load_bundle(tmp_path / "out"))
    assert {layer.compute_dtype for layer in model.layers if layer.weights} == {"float32"}
    import keras

    assert keras.config.dtype_policy().name == "float32", "the policy of this process is put back"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(prepared, augmented, tiny_backbone, tmp_path):
    ids = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        summary = train(prepared, augmented, tmp_path / name, QUICK.changed(seed=seed), ModelParams(), AugmentParams())
        ids.append(summary.model_id)
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_divergence_stops_with_step_and_learning_rate_and_leaves_nothing(prepared, augmented, tiny_backbone, tmp_path):
    params = TrainParams(epochs=3, batch_size=16, learning_rate=1e30, optimizer="sgd", schedule="constant")
    with pytest.raises(NightlyError, match=r"diverged in epoch \d.*learning rate 1e\+30"):
        train(prepared, augmented, tmp_path / "out", params, ModelParams(), AugmentParams())
    assert not (tmp_path / "out").exists()


def test_a_batch_larger_than_the_training_split_is_refused(prepared, augmented, tmp_path):
    with pytest.raises(NightlyError, match=r"train\.batch_size must be at most the \d+ training images, but is 4096"):
        train(prepared, augmented, tmp_path / "o", TrainParams(batch_size=4096), ModelParams(), AugmentParams())


def test_a_required_gpu_that_is_missing_is_named(prepared, augmented, tmp_path):
    with pytest.raises(NightlyError, match=r"train\.require_gpu is true, but \w+ sees no GPU"):
        train(prepared, augmented, tmp_path / "o", QUICK.changed(require_gpu=True), ModelParams(), AugmentParams())


def test_stages_that_have_not_run_are_named(tmp_path, prepared):
    with pytest.raises(NightlyError, match="augment stage first"):
        train(prepared, tmp_path, tmp_path / "o", QUICK, ModelParams(), AugmentParams())


def test_a_models_id_changes_with_all_that_changes_a_prediction():
    weights, decode, unit = [np.ones((2, 2), np.float32)], DecodePolicy(size=8), {"mode": "unit"}
    base = model_id(weights, ["a", "b"], decode, unit)
    assert model_id([weights[0].copy()], ["a", "b"], decode, dict(unit)) == base
    others = [
        model_id([weights[0] * 2], ["a", "b"], decode, unit),
        model_id(weights, ["b", "a"], decode, unit),
        model_id(weights, ["a", "b"], DecodePolicy(size=16), unit),
        model_id(weights, ["a", "b"], decode, {"mode": "caffe"}),
    ]
    assert len({base, *others}) == 5
