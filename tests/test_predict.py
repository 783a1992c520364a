import json
import os
import shutil
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from tasks.bundle import load_bundle
from tasks.calibration import apply_temperature
from tasks.engines import REFERENCE, open_engine
from tasks.errors import NightlyError
from tasks.images import encode_png
from tasks.inputs import LocalFiles
from tasks.outcome import TooManyFailed
from tasks.plan import read_plan, unfinished
from tasks.predict import PredictParams, predict
from tasks.rows import printable
from tasks.store import OWN, PARTS, open_remote, open_store
from tasks.tally import Tally, image_statistics
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


def run(source, exported, out, *, fresh=False, **params):
    summary = predict(source, out, exported, PredictParams(**params), fresh=fresh)
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
    assert facts["files"] == 12 == summary.counts.files
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
    assert sum(summary.counts.statuses.values()) == 18
    assert summary.counts.failed == 6


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
    model_says = open_engine(bundle, REFERENCE).probabilities(images)
    evaluated = dict(zip(order, apply_temperature(model_says, bundle.temperature), strict=True))
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
    assert summary.left_out == {"hidden and side files": 3}
    assert len(table) == 12


def test_a_file_that_vanishes_after_the_search_gets_its_row(folder, exported, tmp_path, monkeypatch):
    find = LocalFiles.find

    def search(self, include=(), exclude=()):
        found = find(self, include, exclude)
        (folder / "green" / "902.png").unlink()
        return found

    monkeypatch.setattr(LocalFiles, "find", search)
    _, table = run(folder, exported, tmp_path / "out")
    assert dict(zip(table.path, table.status, strict=True))["green/902.png"] == "vanished"
    assert len(table) == 12


def test_a_folder_of_bad_files_alone_is_still_accounted_for(exported, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(b"")
    summary, table = run(source, exported, tmp_path / "out")
    assert list(table.status) == ["empty"]
    assert summary.counts.labels == {}


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


def test_a_full_disk_leaves_the_earlier_result_and_the_rerun_goes_on(folder, exported, tmp_path, monkeypatch):
    import tasks.predict

    run(folder, exported, tmp_path / "out")
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    with monkeypatch.context() as patch:

        def full_disk(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(tasks.predict.tables, "write_tables", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run(folder, exported, tmp_path / "out", threshold=0.5)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before
    summary, _ = run(folder, exported, tmp_path / "out", threshold=0.5)
    assert summary.resumed_files == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def everything(out):
    """The bytes of all that a result tells of its images."""
    files = [out / "predictions.csv", out / "predictions.jsonl", *sorted((out / "predictions.parquet").iterdir())]
    return {path.name: path.read_bytes() for path in files}


FORMATS = ("csv", "jsonl")


@pytest.mark.parametrize("stop_after", [0, 1, 4, 5, 11])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(folder, exported, tmp_path, monkeypatch, stop_after):
    (folder / "blue" / "bad.png").write_bytes(b"")
    run(folder, exported, tmp_path / "whole", shard_files=4, formats=FORMATS)
    looked = []

    with monkeypatch.context() as patch:
        from tasks import rows

        add = rows.Part.add

        def killed(self, *outcome):
            if len(looked) == stop_after:
                raise KeyboardInterrupt
            looked.append(outcome)
            add(self, *outcome)

        patch.setattr(rows.Part, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, exported, tmp_path / "cut", shard_files=4, formats=FORMATS)
    assert not (tmp_path / "cut").exists()
    # The size of a shard is the plan's, whatever is asked for later.
    summary, _ = run(folder, exported, tmp_path / "cut", shard_files=7, formats=FORMATS)
    assert summary.resumed_files == stop_after // 4 * 4
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("params", [{"shard_files": 1}, {"shard_files": 5}, {"batch_size": 1}, {"batch_size": 5}])
def test_rows_are_the_same_bits_whatever_the_shards_and_batches(folder, exported, tmp_path, params):
    _, first = run(folder, exported, tmp_path / "a")
    _, second = run(folder, exported, tmp_path / "b", **params)
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_rows_of_unchanged_files_are_taken_over_from_a_complete_result(folder, exported, tmp_path, monkeypatch):
    run(folder, exported, tmp_path / "out", formats=FORMATS, shard_files=5)
    before = everything(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("tasks.prediction.open_engine", None)
        summary, _ = run(folder, exported, tmp_path / "out", formats=FORMATS)
    assert summary.resumed_files == 12
    assert everything(tmp_path / "out") == before
    assert run(folder, exported, tmp_path / "out", fresh=True)[0].resumed_files == 0
    os.utime(folder / "red" / "902.png", ns=(1, 1))
    assert run(folder, exported, tmp_path / "out")[0].resumed_files == 0


def test_of_results_that_are_named_by_their_time_the_newest_serves_the_next(folder, exported, tmp_path, monkeypatch):
    names = ["20261128-020000", "20261129-020000", "20261130-020000"]
    run(folder, exported, tmp_path / names[0], formats=FORMATS)
    run(folder / "red", exported, tmp_path / names[1])
    (tmp_path / "20261129-damaged" / "plan").mkdir(parents=True)
    (tmp_path / "20261129-damaged" / "plan" / "plan.json").write_text("[1]")
    with monkeypatch.context() as patch:
        patch.setattr("tasks.prediction.open_engine", None)
        summary, _ = run(folder, exported, tmp_path / names[2], formats=FORMATS)
    assert summary.resumed_files == 12
    assert everything(tmp_path / names[2]) == everything(tmp_path / names[0])
    assert run(folder, exported, tmp_path / "somewhere")[0].resumed_files == 0
    assert run(folder, exported, tmp_path / "20261201-020000", fresh=True)[0].resumed_files == 0


def test_a_killed_one_of_them_serves_the_next(folder, exported, tmp_path, monkeypatch):
    leave_unfinished(folder, exported, tmp_path / "20261128-020000", monkeypatch, shard_files=5)
    (tmp_path / ".20261128-020000.unfinished" / "predictions.parquet" / "part-00001.parquet").unlink()
    leave_unfinished(folder, exported, tmp_path / "20261127-020000", monkeypatch, threshold=0.99)
    leave_unfinished(folder, exported, tmp_path / "by-name", monkeypatch)
    summary, table = run(folder, exported, tmp_path / "20261129-020000")
    assert summary.resumed_files == 7
    assert len(table) == 12
    left = {path.name for path in tmp_path.glob(".*.unfinished")}
    assert left == {".20261127-020000.unfinished", ".by-name.unfinished"}


def test_all_that_a_result_consists_of_is_known_to_be_its_own(folder, exported):
    out, formats = "memory://results/own", get_args(get_args(PredictParams.model_fields["formats"].annotation)[0])
    predict(folder, out, exported, PredictParams(formats=formats, report=True))
    files, root = open_remote(out)
    assert {path.removeprefix(f"{root}/") for path in files.find(root)} >= {*OWN} - {PARTS}
    open_store(out).clear()
    assert files.find(root) == []


def test_a_complete_result_at_an_address_is_made_anew_when_files_change(folder, exported):
    out = "memory://results/anew"
    assert predict(folder, out, exported, PredictParams()).resumed_files == 0
    assert predict(folder, out, exported, PredictParams()).resumed_files == 12
    (folder / "red" / "900.png").unlink()
    summary = predict(folder, out, exported, PredictParams())
    assert (summary.resumed_files, summary.changed_files, summary.counts.files) == (0, 0, 11)
    open_store(out).clear()


def leave_unfinished(folder, exported, out, monkeypatch, **params):
    import tasks.predict

    with monkeypatch.context() as patch:
        patch.setattr(tasks.predict, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, exported, out, **params)


def test_another_option_is_refused_with_its_name_and_fresh_starts_over(folder, exported, tmp_path, monkeypatch):
    leave_unfinished(folder, exported, tmp_path / "out", monkeypatch, threshold=0.25)
    message = r"threshold was 0\.25 and is 0\.75; top-k was 3 and is 2\. Repeat .* --fresh"
    with pytest.raises(NightlyError, match=message):
        run(folder, exported, tmp_path / "out", threshold=0.75, top_k=2)
    summary, table = run(folder, exported, tmp_path / "out", threshold=0.75, top_k=2, fresh=True)
    assert summary.resumed_files == 0
    assert {len(labels) for labels in table["labels"]} == {2}


def test_another_model_is_refused(folder, exported, tmp_path, monkeypatch):
    leave_unfinished(folder, exported, tmp_path / "out", monkeypatch)
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    facts = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps({**facts, "id": "0123456789ab"}))
    with pytest.raises(NightlyError, match=rf'model was "{facts["id"]}" and is "0123456789ab"'):
        run(folder, other, tmp_path / "out")


def test_a_run_that_goes_on_says_what_changed_meanwhile(folder, exported, tmp_path, monkeypatch):
    leave_unfinished(folder, exported, tmp_path / "out", monkeypatch)
    (folder / "new.png").write_bytes(encode_png(colored_image("red", 1)))
    (folder / "red" / "901.png").unlink()
    os.utime(folder / "red" / "902.png", ns=(1, 1))
    summary, table = run(folder, exported, tmp_path / "out")
    assert summary.changed_files == 3
    assert len(table) == 12, "the plan's files, each accounted for"


def test_two_at_once_write_no_mixed_result(folder, exported, tmp_path):
    with unfinished(str(tmp_path / "out")).locked(), pytest.raises(NightlyError, match="another process is writing"):
        run(folder, exported, tmp_path / "out")
    run(folder, exported, tmp_path / "out")


def test_a_torn_plan_is_made_anew(folder, exported, tmp_path, monkeypatch):
    leave_unfinished(folder, exported, tmp_path / "out", monkeypatch)
    store = unfinished(str(tmp_path / "out"))
    store.write("plan/plan.json", b'{"format": 1, "iden')
    assert read_plan(store) is None
    summary, _ = run(folder, exported, tmp_path / "out")
    assert summary.counts.files == 12


def test_json_lines_say_the_same_as_parquet(folder, exported, tmp_path):
    (folder / "bad\n.png").write_bytes(b"")
    _, table = run(folder, exported, tmp_path / "out", formats=["jsonl"])
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["path"] for row in rows] == list(table.path)
    for row, expected in zip(rows, table.itertuples(), strict=True):
        assert list(row) == COLUMNS
        assert row["status"] == expected.status
        if row["status"] == "ok":
            assert row["label"] == expected.label
            assert np.float32(row["probabilities"]).tolist() == expected.probabilities.tolist()
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_all_probabilities_are_those_of_every_class(folder, exported, tmp_path):
    _, table = run(folder, exported, tmp_path / "out", top_k=1, all_probabilities=True)
    for row in table.itertuples():
        assert sorted(row.labels) == sorted(COLORS)
        assert sum(row.probabilities) == pytest.approx(1, abs=1e-5)
        assert (np.diff(row.probabilities) <= 0).all()


@pytest.mark.parametrize(
    ("params", "refused"),
    [
        ({}, False),
        ({"strict": True}, True),
        ({"max_failed": "0"}, True),
        ({"max_failed": "1"}, True),
        ({"max_failed": "2"}, False),
        ({"max_failed": "14%"}, True),
        ({"max_failed": "15%"}, False),
        ({"max_failed": 2}, False),
    ],
)
def test_too_many_failures_are_an_error_after_all_is_written(folder, exported, tmp_path, params, refused):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"")
    if not refused:
        run(folder, exported, tmp_path / "out", **params)
    else:
        with pytest.raises(TooManyFailed, match=r"2 of 14 files failed \(2 empty\), allowed: .*predictions\.parquet"):
            run(folder, exported, tmp_path / "out", **params)
    assert len(pd.read_parquet(tmp_path / "out" / "predictions.parquet")) == 14


@pytest.mark.parametrize("value", ["two", "-1", "2 %", "%"])
def test_a_limit_of_failures_is_a_number_or_a_share(value):
    with pytest.raises(ValueError, match="max_failed"):
        PredictParams(max_failed=value)


def test_the_drift_of_a_folder_is_told(folder, exported, tmp_path):
    model, dark = tmp_path / "model", tmp_path / "dark"
    shutil.copytree(exported, model)
    images = np.stack([colored_image(name, seed) for name in COLORS for seed in range(40)])
    probabilities, features = next(open_engine(load_bundle(model), REFERENCE, batch_size=120).outputs([images]))
    reference = Tally()
    reference.add(np.stack([image_statistics(image) for image in images]), features, probabilities)
    reference.save(load_bundle(model).reference_file)
    dark.mkdir()
    for seed, image in enumerate(images):
        (dark / f"{seed}.png").write_bytes(encode_png(image // 4))
    summary, _ = run(dark, model, tmp_path / "out")
    assert summary.drift["level"] == "strong"
    assert any("darker" in sentence for sentence in summary.drift["sentences"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["drift"] == summary.drift


def test_a_report_is_written_if_asked_for(folder, exported, tmp_path):
    (folder / "bad.png").write_bytes(b"")
    (folder / "100% blue #1.png").write_bytes((folder / "blue" / "900.png").read_bytes())
    run(folder, exported, tmp_path / "out", report=True)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/" in page
    assert "../source/blue/900.png" in page
    assert "../source/100%25%20blue%20%231.png" in page


def test_images_are_put_into_a_folder_for_each_class(folder, exported, tmp_path):
    (folder / "bad.png").write_bytes(b"")
    predict(folder, tmp_path / "out", exported, PredictParams(threshold=0.0), sort_into=tmp_path / "sorted")
    links = [path for path in (tmp_path / "sorted").rglob("*") if path.is_symlink()]
    assert len(links) == 12
    assert all(link.relative_to(tmp_path / "sorted").parts[0] == link.resolve().parent.name for link in links)


def test_prediction_with_openvino_imports_no_tensorflow(folder, exported, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from tasks.predict import PredictParams, predict;"
        "predict(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), PredictParams(engine='openvino'));"
        "assert not {'tensorflow', 'keras', 'jax', 'prefect', 'dvc', 'matplotlib'} & set(sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "out"), str(exported)]
    subprocess.run(arguments, check=True, capture_output=True)
    assert len(pd.read_parquet(tmp_path / "out" / "predictions.parquet")) == 12
