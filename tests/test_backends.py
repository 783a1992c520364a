"""The other backend: the whole of tasks/ on JAX, in a process where TensorFlow cannot be imported."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from tasks.bundle import load_bundle

SCRIPT = """
import sys
sys.modules["tensorflow"] = None  # from here on, importing it is an ImportError
from pathlib import Path
from tests.conftest import small_network
from tasks.augment import augment
from tasks.augmentation import AugmentParams
from tasks.classifier import ModelParams
from tasks.evaluate import EvaluateParams, evaluate
from tasks.export import ExportParams, export
from tasks.predict import PredictParams, predict
from tasks.recipe import TrainParams
from tasks.train import train

prepared, out = Path(sys.argv[1]), Path(sys.argv[2])
augment(prepared, out / "augmented", out / "preview.png", AugmentParams())
with small_network():
    params = TrainParams(epochs=8, batch_size=16, learning_rate=0.03)
    model = ModelParams(batch_normalization_momentum=0.5)
    train(prepared, out / "augmented", out / "candidate", params, model, AugmentParams())
export(out / "candidate", prepared, out / "exported", ExportParams())
evaluate(out / "exported", prepared, out / "evaluation", EvaluateParams())
predict(prepared / "examples", out / "predictions", out / "exported", PredictParams(engine="keras"))
"""


@pytest.mark.slow
def test_every_stage_runs_on_jax_without_tensorflow(prepared, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(prepared), str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(jax, float32, compiled by XLA" in done.stdout
    bundle = load_bundle(tmp_path / "exported")
    assert bundle.training["backend"] == "jax"
    assert bundle.engines["openvino-float32"]["agreement"] == 1.0
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["accuracy"] > 0.9
    table = pd.read_parquet(tmp_path / "predictions" / "predictions.parquet")
    assert (table.path.str.split("/").str[0] == table.label).mean() > 0.9


@pytest.mark.slow
def test_a_model_trained_on_tensorflow_gives_the_same_on_jax(exported, prepared, tmp_path):
    tables = []
    for backend in ("tensorflow", "jax"):
        command = [sys.executable, "-m", "tasks.predict", str(prepared / "examples")]
        command += [
            "--model",
            str(exported),
            "--out",
            str(tmp_path / backend),
            "--params",
            str(tmp_path / "params.yaml"),
        ]
        (tmp_path / "params.yaml").write_text("predict: {engine: keras}\n")
        subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}, check=True, capture_output=True)
        tables.append(pd.read_parquet(tmp_path / backend / "predictions.parquet"))
    assert list(tables[0].label) == list(tables[1].label)
    assert (tables[0].confidence - tables[1].confidence).abs().max() < 1e-5
