"""Heat maps and what ``nightly explain`` writes of them."""

import html
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from flows import cli
from tasks.bundle import load_bundle, load_keras_model
from tasks.classifier import ModelParams, build_classifier
from tasks.errors import NightlyError
from tasks.explain import EDGE, explain
from tasks.files import read_json
from tasks.heat import GradCam, colors, overlay
from tasks.images import encode_png
from tasks.outcome import PredictParams
from tasks.predict import predict
from tests.conftest import COLORS, colored_image

UNIT = {"mode": "unit", "mean": [0.0] * 3, "std": [255.0] * 3, "channel_order": "RGB"}
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
THREE = IMAGES[:3]
# The notebook's head, and the plain one.
HEADS = {
    "plain": {},
    "notebook": {"pool": "flatten", "head_units": (16, 8), "head_batch_normalization": True, "dropout": 0.5},
}


def classifier(**params):
    """Return a small classifier of 32 px with random weights, also in its BatchNormalization."""
    import keras

    keras.utils.set_random_seed(1)
    model = build_classifier(ModelParams(**{"doublings": 0, **params}), 32, 4, UNIT)
    for variable in model.variables:
        if re.search("moving|beta|bias", variable.path):
            variable.assign(np.random.default_rng(1).uniform(0.1, 0.6, variable.shape))
    return model


# --- the heat


def test_with_a_mean_over_all_places_it_is_the_class_activation_map(tiny_backbone):
    """Section 3.1 of the paper: then the gradient is the head's own weight."""
    model = classifier()
    gradcam = GradCam(model)
    assert gradcam.cells == (8, 8)
    features = np.asarray(gradcam.extractor(THREE))
    kernel = model.get_layer("probabilities").get_weights()[0]
    expected = np.maximum(np.einsum("nijk,kn->nij", features, kernel[:, :3]) / 64, 0)
    assert expected.any()
    np.testing.assert_allclose(gradcam.maps(THREE, [0, 1, 2]), expected, atol=1e-6)
    heat = gradcam.heat(THREE, [0, 1, 2])
    assert heat.shape == (3, 32, 32)
    for found, cells in zip(heat, expected, strict=True):
        if cells.any():
            assert found.max() == 1
            assert np.corrcoef(found.reshape(8, 4, 8, 4).mean(axis=(1, 3)).ravel(), cells.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("head", HEADS)
def test_the_weight_of_a_channel_is_how_much_it_raises_the_score(tiny_backbone, head):
    """Equation 1, measured: raise a whole channel a little and see what becomes of the class's score."""
    gradcam = GradCam(classifier(**HEADS[head]))
    features = np.asarray(gradcam.extractor(THREE))
    step, cells = 1e-4, 64
    weights = np.zeros((3, features.shape[3]))
    for channel in range(features.shape[3]):
        shift = np.zeros_like(features)
        shift[..., channel] = step
        above, below = (np.asarray(gradcam.head(features + sign * shift, training=False)) for sign in (1, -1))
        weights[:, channel] = (above - below)[range(3), range(3)] / (2 * step * cells)
    expected = np.maximum((features * weights[:, np.newaxis, np.newaxis]).sum(axis=3), 0)
    assert expected.any()
    np.testing.assert_allclose(gradcam.maps(THREE, [0, 1, 2]), expected, atol=0.01 * expected.max())


@pytest.mark.parametrize(("size", "layer", "cells"), [(32, "conv4_block3_out", 8), (8, "conv3_block3_out", 4)])
def test_a_map_too_small_to_see_anything_is_replaced_by_an_earlier_one(size, layer, cells):
    model = build_classifier(ModelParams(backbone="resnet20", doublings=0), size, 4, UNIT)
    gradcam = GradCam(model)
    assert (gradcam.layer, gradcam.cells) == (layer, (cells, cells))
    images = THREE[:, :size, :size]
    scores = np.exp(np.asarray(gradcam.head(gradcam.extractor(images), training=False)))
    # What follows the cut is the rest of the classifier.
    np.testing.assert_allclose(scores / scores.sum(axis=1, keepdims=True), np.asarray(model(images)), atol=1e-5)
    assert gradcam.heat(images, [0, 1, 2]).shape == (3, size, size)


def test_a_picture_is_explained_the_same_whatever_comes_with_it(tiny_backbone):
    gradcam = GradCam(classifier())
    together = gradcam.heat(IMAGES, [index % 4 for index in range(20)])
    np.testing.assert_allclose(gradcam.heat(IMAGES[17:18], [1])[0], together[17], atol=1e-5)


def test_where_nothing_speaks_for_a_class_nothing_is_hot(tiny_backbone):
    model = classifier()
    kernel, bias = model.get_layer("probabilities").get_weights()
    model.get_layer("probabilities").set_weights([-np.abs(kernel), bias])
    assert not GradCam(model).heat(THREE, [0, 1, 2]).any()
    assert GradCam(model).heat(IMAGES[:0], []).shape == (0, 32, 32)


def test_the_heat_is_where_the_class_is(exported):
    bundle = load_bundle(exported)
    gradcam = GradCam(load_keras_model(bundle))
    both = np.concatenate([colored_image("red", 1)[:, :4], colored_image("blue", 1)[:, 4:]], axis=1)
    red, blue = gradcam.heat(np.stack([both, both]), [bundle.classes.index(name) for name in ("red", "blue")])
    assert red[:, :4].mean() > 2 * red[:, 4:].mean()
    assert blue[:, 4:].mean() > 2 * blue[:, :4].mean()


def test_an_overlay_leaves_what_is_cold_as_it_is():
    heat = np.zeros((32, 32), np.float32)
    heat[:8] = 1
    laid = overlay(IMAGES[0], heat)
    assert (laid[8:] == IMAGES[0][8:]).all()
    np.testing.assert_allclose(laid[:8], 0.35 * IMAGES[0][:8] + 0.65 * colors(heat)[:8], atol=0.51)
    brightness = colors(np.linspace(0, 1, 256, dtype=np.float32)[np.newaxis]).sum(axis=2)[0]
    assert (np.diff(brightness.astype(int)) >= 0).mean() > 0.9


# --- what is written


@pytest.fixture
def folder(tmp_path):
    """A folder of three colors with hostile names, and two files that are no pictures."""
    source = tmp_path / "pictures"
    source.mkdir()
    for name, path in zip(COLORS, ("a <b>$1.png", "b&'.png", "c.png"), strict=True):
        (source / path).write_bytes(encode_png(colored_image(name, 900)))
    (source / "d.png").write_bytes(b"")
    (source / "<script>.jpg").write_text("no image")
    return source


def test_labels_and_probabilities_are_those_of_a_prediction(folder, exported, tmp_path):
    params = PredictParams(top_k=3)
    predict(folder, tmp_path / "predicted", exported, params)
    table = pd.read_parquet(tmp_path / "predicted" / "predictions.parquet").set_index("path")
    explanation = explain([str(folder)], tmp_path / "out", exported, params)
    assert [picture.row["label"] for picture in explanation.pictures] == ["blue", "green", "red"]
    for picture in explanation.pictures:
        row = table.loc[picture.row["path"]]
        assert picture.answers == dict(zip(row["labels"], map(float, row["probabilities"]), strict=True))
        assert picture.row["accepted"] == row["accepted"]
        assert picture.heat.max() == 1
    facts = read_json(tmp_path / "out" / "explain.json")
    assert facts["statuses"] == {"ok": 3, "empty": 1, "not_an_image": 1}
    for entry in facts["files"]:
        row = table.loc[entry["path"]]
        assert (entry["label"], entry["confidence"]) == (row["label"], float(row["confidence"]))
        assert entry["explained"] == entry["label"]
    failed = {row["path"]: (row["status"], row["reason"]) for row in facts["failed"]}
    assert failed == {path: (table.status[path], table.reason[path]) for path in ("<script>.jpg", "d.png")}


def test_the_page_has_every_picture_its_figures_and_no_markup_of_a_name(folder, exported, tmp_path):
    explanation = explain([str(folder)], tmp_path / "out", exported, PredictParams(top_k=2))
    page = (tmp_path / "out" / "explain.html").read_text()
    figures = re.findall(r'<data value="([^"]+)" data-metric="pictures\.(\d+)\.(\w+)"', page)
    files = read_json(tmp_path / "out" / "explain.json")["files"]
    assert [float(value) for value, *_ in figures] == [entry["confidence"] for entry in files]
    assert page.count("<img ") == 9
    assert page.count("data:image/png;base64,") == 9
    assert "<script" not in page
    assert "a <b>" not in page
    for row in [*(picture.row for picture in explanation.pictures), *explanation.failed]:
        assert html.escape(row["path"], quote=False).replace("'", "&#39;") in page
    assert not re.search(r"(?:src|href)=\"(?!data:image/)|url\(|@import", page)


def test_the_sheet_shows_each_picture_and_its_heat(folder, exported, tmp_path):
    explanation = explain([str(folder)], tmp_path / "out", exported, PredictParams())
    sheet = np.asarray(Image.open(tmp_path / "out" / "explain.png").convert("RGB"))
    margin, height = 24, EDGE + 22
    for row, picture in enumerate(explanation.pictures):
        tile = sheet[margin + row * height : margin + row * height + EDGE, margin : margin + EDGE]
        cell = EDGE // 8
        assert (tile[cell // 2 :: cell, cell // 2 :: cell] == picture.pixels).all()
        heat = sheet[margin + row * height :][:EDGE, margin + EDGE + 6 :][:, :EDGE]
        hottest = np.unravel_index(heat.sum(axis=2).argmax(), (EDGE, EDGE))
        assert picture.heat[hottest[0] // cell, hottest[1] // cell] > 0.8


def test_another_class_can_be_explained(folder, exported, tmp_path):
    said = explain([str(folder / "c.png")], tmp_path / "said", exported, PredictParams(top_k=1))
    asked = explain([str(folder / "c.png")], tmp_path / "asked", exported, PredictParams(top_k=1), wanted="blue")
    assert [picture.explained for picture in (*said.pictures, *asked.pictures)] == ["red", "blue"]
    assert [name for name, _ in asked.pictures[0].shown(1)] == ["red", "blue"]
    assert not np.allclose(said.pictures[0].heat, asked.pictures[0].heat)
    assert "The model says <bdi>red</bdi>" in (tmp_path / "asked" / "explain.html").read_text()
    assert "The model says" not in (tmp_path / "said" / "explain.html").read_text()
    with pytest.raises(NightlyError, match=r"--class 'bleu' is none of model .*, did you mean 'blue'\?"):
        explain([str(folder)], tmp_path / "out", exported, PredictParams(), wanted="bleu")


def test_several_sources_and_a_limit(folder, exported, tmp_path):
    single = str(folder / "c.png")
    explanation = explain([single, str(folder)], tmp_path / "out", exported, PredictParams(), limit=3)
    assert explanation.left_out == 3
    assert [picture.row["path"] for picture in explanation.pictures] == [single, f"{folder}/a <b>$1.png"]
    assert [row["path"] for row in explanation.failed] == [f"{folder}/<script>.jpg"]
    assert "3 more files not looked at" in (tmp_path / "out" / "explain.html").read_text()


def test_without_a_single_picture_there_is_nothing_to_write(folder, exported, tmp_path):
    with pytest.raises(NightlyError, match=r"no picture to explain: d\.png is empty"):
        explain([str(folder / "d.png")], tmp_path / "out", exported, PredictParams())
    (tmp_path / "none").mkdir()
    with pytest.raises(NightlyError, match="holds no images"):
        explain([str(tmp_path / "none")], tmp_path / "out", exported, PredictParams())
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_found_and_where(folder, exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text("predict: {top_k: 3}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["nightly", "explain", "pictures/c.png", "--model", str(exported), "--top-k", "1"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert (caught.value.code, err) == (0, "")
    page = next((tmp_path / "data" / "explanations").glob("*/explain.html"))
    assert re.search(r"label +red \(red \d+\.\d%\)\n", out)
    assert re.search(rf"page +{page.relative_to(tmp_path)}\n", out)


@pytest.mark.slow
def test_jax_gives_the_same_heat_without_tensorflow(folder, exported, tmp_path):
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from pathlib import Path; import numpy as np; from tasks.explain import explain\n"
        "from tasks.outcome import PredictParams\n"
        "found = explain([sys.argv[1]], Path(sys.argv[3]), Path(sys.argv[2]), PredictParams())\n"
        "np.save(sys.argv[3] + '/heat.npy', [picture.heat for picture in found.pictures])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), str(exported), str(tmp_path / "jax")]
    subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "jax"}, check=True)
    here = explain([str(folder)], tmp_path / "tensorflow", exported, PredictParams())
    np.testing.assert_allclose(
        np.load(tmp_path / "jax" / "heat.npy"), [picture.heat for picture in here.pictures], atol=1e-4
    )
