"""Every network of the family, trained for an epoch on handwritten digits, exported and evaluated."""

import io
import itertools
import json
import math
import tarfile

import numpy as np
import pandas as pd
import pytest

from tasks.augmentation import AugmentParams
from tasks.bundle import load_bundle
from tasks.classifier import ModelParams
from tasks.download import digit_images
from tasks.evaluate import EvaluateParams, evaluate
from tasks.export import ExportParams, export
from tasks.prepare import PrepareParams, prepare
from tasks.recipe import TrainParams
from tasks.resnet import NETWORKS
from tasks.train import train

DIGITS, IMAGES_PER_DIGIT = "0123", 30

PLAIN_IMAGES = AugmentParams(flip_horizontal=False, shift_pixels=0, eraser={"p": 0.0})


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The prepare stage's output for four of the digits, 8 px, 30 images each."""
    folder = tmp_path_factory.mktemp("digits")
    with tarfile.open(folder / "images.tar", "w") as archive:
        for digit, images in itertools.groupby(digit_images(), key=lambda image: image[0][0]):
            for name, data in itertools.islice(images, IMAGES_PER_DIGIT if digit in DIGITS else 0):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    facts = {"source": "folder", "format": "folder", "file": "images.tar", "bytes": 0, "sha256": ""}
    (folder / "source.json").write_text(json.dumps(facts))
    params = PrepareParams(decode={"size": 8}, normalization="standardize", validation_fraction=0.2, test_fraction=0.2)
    prepare(folder, folder / "nowhere", folder / "prepared", folder / "card.html", params)
    return folder / "prepared"


@pytest.fixture
def eagerly():
    """Run TensorFlow without building graphs, which for a hundred layers takes a minute; other backends as ever."""
    import keras

    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def run(name, digits, augmented, out, epochs, batch_size, openvino):
    """Train, export and evaluate; return the history, the metrics and the bundle."""
    doublings = 0 if NETWORKS[name].cifar else 2
    model = ModelParams(backbone=name, doublings=doublings, batch_normalization_momentum=0.5)
    params = TrainParams(epochs=epochs, batch_size=batch_size, learning_rate=0.001)
    train(digits, augmented, out / "candidate", params, model, PLAIN_IMAGES)
    export(out / "candidate", digits, out / "exported", ExportParams(openvino=openvino))
    evaluate(out / "exported", digits, out / "evaluation", EvaluateParams())
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    return pd.read_csv(out / "candidate" / "history.csv"), metrics, load_bundle(out / "exported")


#: One of each kind of block but resnet50's, whose training is that of tests/test_end_to_end.py.
KINDS = ("resnet18", "resnet20", "plain20")
#: More of resnet50's blocks, and minutes of compiling; tests/test_resnet.py compares them with Keras's own.
DEEPEST = ("resnet101", "resnet152")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_network_learns_the_digits(name, digits, augmented, tmp_path):
    history, metrics, bundle = run(name, digits, augmented, tmp_path, epochs=3, batch_size=8, openvino=True)
    assert history.val_loss.min() < history.val_loss.iloc[0]
    assert history.val_accuracy.max() > 0.6  # guessing gives 0.25
    assert metrics["engines"]["openvino-float32"]["agreement"] == 1.0
    assert bundle.parameters["model"]["backbone"] == name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly` option")
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {*KINDS, *DEEPEST}))
def test_every_other_network_is_trained_and_evaluated(name, digits, augmented, eagerly, tmp_path):
    history, metrics, bundle = run(name, digits, augmented, tmp_path, epochs=1, batch_size=32, openvino=False)
    assert np.isfinite(history.to_numpy()).all()
    assert len(history) == 1
    assert math.isfinite(metrics["log_loss"])
    assert metrics["test_images"] == 16
    assert bundle.parameters["model"]["backbone"] == name
