import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest

from tasks.bundle import load_bundle
from tasks.engines import REFERENCE, open_engine
from tasks.errors import NightlyError
from tasks.images import encode_png
from tasks.predict import PredictParams, find_files, predict, printable
from tests.conftest import COLORS, colored_image

COLUMNS = [
    "path", "status", "reason", "label", "confidence", "accepted", "labels", "probabilities", "width", "height",
    "bytes", "model_id",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder of twelve good images in two sub-folders."""
    source = tmp_path / "source"
    for name in COLORS:
        for seed in range(4):
            path = source / name / f"{900 + seed}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(colored_image(name, 900 + seed)))
    return source


def run(source, exported, out, **params):
    summary = predict(source, out, exported, PredictParams(**params))
    return summary, pd.read_parquet(out / "predictions.parquet")


def test_every_file_gets_a_row_with_its_label(folder, exported, tmp_path):
    summary, table = run(folder, exported, tmp_path / "out")
    assert list(table.columns) == COLUMNS
    assert list(table.path) == sorted(table.path)
    assert len(table) == 12
    assert set(table.status) == {"ok"}
    assert [path.split("/")[0] for path in table.path] == list(table.label)
    assert (table.confidence == [probabilities[0] for probabilities in table.probabilities]).all()
    assert all(len(labels) == 3 for labels in table["labels"])
    assert set(table.model_id) == {load_bundle(exported).id}
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert facts["files"] == 12 == summary.files
    assert facts["labels"] == {"blue": 4, "green": 4, "red": 4}
    assert facts["accepted"] == int(table.accepted.sum())


def test_bad_files_get_a_reason_and_shift_nothing(folder, exported, tmp_path):
    _, clean = run(folder, exported, tmp_path / "clean", batch_size=5)
    (folder / "blue" / "0-empty.png").write_bytes(b"")
    (folder / "blue" / "text.png").write_text("no image")
    (folder / "green" / "901.5.png").write_bytes(encode_png(colored_image("green", 1))[:60])
    os.mkfifo(folder / "red" / "pipe.png")
    (folder / "red" / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "zz.png").write_bytes(b"")
    summary, table = run(folder, exported, tmp_path / "dirty", batch_size=5)
    status = dict(zip(table.path, table.status, strict=True))
    assert len(table) == 18
    assert status["blue/0-empty.png"] == status["zz.png"] == "empty"
    assert status["blue/text.png"] == "not_an_image"
    assert status["green/901.5.png"] == "truncated"
    assert status["red/pipe.png"] == "unreadable"
    assert status["red/dangling.png"] == "vanished"
    bad = table[table.status != "ok"]
    assert bad.reason.str.len().min() > 0
    assert bad[["label", "confidence", "labels", "probabilities"]].isna().all(axis=None)
    assert not bad.accepted.any()
    good = table[table.status == "ok"].reset_index(drop=True)
    pd.testing.assert_frame_equal(good, clean)
    assert sum(summary.statuses.values()) == 18


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_changes_no_label(folder, exported, tmp_path, batch_size):
    _, first = run(folder, exported, tmp_path / "a", engine="keras")
    _, second = run(folder, exported, tmp_path / "b", engine="keras", batch_size=batch_size)
    pd.testing.assert_series_equal(first.label, second.label)
    np.testing.assert_allclose(first.confidence, second.confidence, atol=1e-6)


def test_a_picture_has_the_same_probabilities_in_training_data_and_in_prediction(exported, prepared, tmp_path):
    """The notebook's own fault was here: prediction preprocessed differently from training."""
    examples = prepared / "examples"
    _, table = run(examples, exported, tmp_path / "out", engine="keras", top_k=3)
    manifest = pd.read_parquet(prepared / "manifest.parquet")
    order = manifest[(manifest.split == "test") & (manifest.status == "ok")].sort_values("position").name
    images = np.load(prepared / "test" / "images.npy")
    bundle = load_bundle(exported)
    evaluated = dict(zip(order, open_engine(bundle, REFERENCE).probabilities(images), strict=True))
    assert len(table) == len(list(examples.rglob("*.png")))
    for row in table.itertuples():
        by_label = dict(zip(row.labels, row.probabilities, strict=True))
        np.testing.assert_allclose([by_label[name] for name in bundle.classes], evaluated[row.path], atol=1e-5)


def test_csv_says_the_same_as_parquet(folder, exported, tmp_path):
    (folder / "bad.png").write_bytes(b"")
    _, table = run(folder, exported, tmp_path / "out")
    csv = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(csv.columns) == COLUMNS
    assert list(csv.path) == list(table.path)
    assert list(csv.status) == list(table.status)
    np.testing.assert_allclose(csv.confidence, table.confidence, atol=1e-7)
    good = csv[csv.status == "ok"].iloc[0]
    assert json.loads(good["labels"]) == list(table["labels"][csv.index[csv.path == good.path][0]])


def test_the_threshold_decides_what_is_accepted(folder, exported, tmp_path):
    _, everything = run(folder, exported, tmp_path / "a", threshold=0.0)
    _, nothing = run(folder, exported, tmp_path / "b", threshold=1.0)
    assert everything.accepted.all()
    assert (nothing.accepted == (nothing.confidence >= 1)).all()
    summary, _ = run(folder, exported, tmp_path / "c")
    assert summary.threshold == load_bundle(exported).threshold


def test_names_survive_as_they_are(folder, exported, tmp_path):
    names = ["emoji 🐈.png", "line\nbreak.png", "Ünïcode.png", "10.png", "9.png"]
    for name in names:
        shutil.copy(folder / "blue" / "900.png", folder / name)
    odd = os.fsencode(folder) + b"/bad-\xff.png"
    shutil.copy(os.fsencode(folder / "blue" / "900.png"), odd)
    _, table = run(folder, exported, tmp_path / "out")
    assert set(names) <= set(table.path)
    assert "bad-\\xff.png" in set(table.path)
    paths = list(table.path)
    assert paths.index("9.png") < paths.index("10.png")
    assert list(pd.read_csv(tmp_path / "out" / "predictions.csv").path) == paths
    assert printable("plain/name.png") == "plain/name.png"


def test_hidden_and_side_files_are_counted_apart(folder, exported, tmp_path):
    for name in (".hidden.png", "Thumbs.db", "notes.txt"):
        (folder / name).write_text("x")
    summary, table = run(folder, exported, tmp_path / "out")
    assert summary.side_files == 3
    assert len(table) == 12


def test_a_loop_of_links_ends(folder):
    (folder / "blue" / "loop").symlink_to(folder, target_is_directory=True)
    files, _ = find_files(folder)
    assert len(files) == 12


def test_a_file_that_vanishes_after_the_search_gets_its_row(folder, exported, tmp_path, monkeypatch):
    import tasks.predict

    def search(source):
        found = find_files(source)
        (folder / "green" / "902.png").unlink()
        return found

    monkeypatch.setattr(tasks.predict, "find_files", search)
    _, table = run(folder, exported, tmp_path / "out")
    assert dict(zip(table.path, table.status, strict=True))["green/902.png"] == "vanished"
    assert len(table) == 12


def test_a_folder_of_bad_files_alone_is_still_accounted_for(exported, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(b"")
    summary, table = run(source, exported, tmp_path / "out")
    assert list(table.status) == ["empty"]
    assert summary.labels == {}


def test_one_image_can_be_given(folder, exported, tmp_path):
    _, table = run(folder / "red" / "900.png", exported, tmp_path / "out")
    assert list(table.path) == ["900.png"]
    assert list(table.label) == ["red"]


def test_an_empty_or_missing_folder_is_an_error(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NightlyError, match="holds no images"):
        run(tmp_path / "empty", exported, tmp_path / "out")
    with pytest.raises(NightlyError, match="there is nothing at"):
        run(tmp_path / "missing", exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_result_is_replaced(folder, exported, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.doc").write_text("years of work")
    with pytest.raises(NightlyError, match=r"holds other files \(thesis\.doc\)"):
        run(folder, exported, precious)
    assert (precious / "thesis.doc").read_text() == "years of work"
    run(folder, exported, tmp_path / "out")
    (folder / "red" / "900.png").unlink()
    _, table = run(folder, exported, tmp_path / "out")
    assert len(table) == 11


def test_a_failure_half_way_leaves_the_earlier_result(folder, exported, tmp_path, monkeypatch):
    import tasks.predict

    run(folder, exported, tmp_path / "out")
    before = (tmp_path / "out" / "predictions.csv").read_bytes()

    def full_disk(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(tasks.predict, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(folder, exported, tmp_path / "out", threshold=0.5)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_prediction_with_openvino_imports_no_tensorflow(folder, exported, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from tasks.predict import PredictParams, predict;"
        "predict(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), PredictParams(engine='openvino'));"
        "assert not {'tensorflow', 'keras', 'jax', 'prefect', 'dvc'} & set(sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "out"), str(exported)]
    subprocess.run(arguments, check=True, capture_output=True)
    assert (tmp_path / "out" / "predictions.parquet").is_file()
