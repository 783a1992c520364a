import re
import shutil
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote
from zoneinfo import ZoneInfo

import pandas as pd
import pytest

from flows import night as pages
from flows import notify
from flows.champion import Judgement
from flows.changes import changes
from flows.publish import Published
from flows.summary import Night, Predictions, StageRun, markdown
from flows.workspace import Workspace
from tasks.bundle import load_bundle
from tasks.files import read_json, write_json
from tasks.inbox import Intake
from tasks.judge import Verdict
from tests.browser import Page
from tests.miniature import export
from tests.test_report import HOSTILE

# One of apprise's plugins, which all are loaded with the first address.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

ZONE = ZoneInfo("Europe/Madrid")
STARTED = datetime(2026, 11, 24, 2, 0, tzinfo=ZONE)
NEXT = datetime(2026, 11, 25, 2, 0, tzinfo=ZONE)
HISTORY = "epoch,loss,accuracy,val_loss,val_accuracy\n1,2.0,0.3,1.8,0.35\n2,1.0,0.6,1.1,0.5\n3,0.5,0.8,nan,0.75\n"
COMPARISON = {
    "gain": 0.018229,
    "calibration_change": -0.0088,
    "test_images": 384,
    "now_right": 11,
    "now_wrong": 4,
    "p": 0.118,
    "interval": [-0.002604, 0.039063],
    "classes": [],
}


def figures(model_id: str, accuracy: float, recalls: dict[str, float | None], **more) -> dict:
    per_class = {name: {"recall": recall, "images": 30} for name, recall in recalls.items()}
    return {
        "model_id": model_id,
        "test_images": 384,
        "accuracy": accuracy,
        "log_loss": 0.2 - accuracy / 10,
        "calibration_error": 0.02,
        "per_class": per_class,
        **more,
    }


CHALLENGER = figures("bbb", 0.986979, {"a": 1.0, "b": 0.9, "c": 0.8, "d": 1.0}, accepted=0.98)
CHAMPION = figures("aaa", 0.96875, {"a": 0.9, "b": 0.95, "c": 0.83, "d": 1.0})


def prepare(workspace: Workspace, digest: str, counts: dict[str, int]) -> None:
    """Write what the prepare stage says of its data set, with a few images that it left out."""
    rows = [(name, "ok") for name, number in counts.items() for _ in range(number)] + [("a", "duplicate")] * 5
    workspace.prepared.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=["class", "status"]).to_parquet(workspace.prepared / "manifest.parquet")
    total = sum(counts.values())
    facts = {"data_digest": digest, "test_digest": "t1", "counts": {"train": total - 2, "validation": 1, "test": 1}}
    write_json(workspace.prepared / "prepared.json", facts)


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """Champion aaa in the registry, challenger bbb exported, a data set, and the log of a training."""
    space = Workspace(tmp_path)
    space.params.write_text("train: {epochs: 9}\n")
    exported, evaluation = export(space.models, "aaa")
    trained = {"model": {"dropout": 0.0}, "train": {"epochs": 12, "seed": 1}}
    load_bundle(exported).changed(parameters=trained, libraries={"keras": "3.12"}).save()
    shutil.copytree(exported, space.registry / "aaa")
    shutil.copytree(evaluation, space.registry / "aaa" / "evaluation")
    export(space.models, "bbb")
    trained = {"model": {"dropout": 0.0}, "train": {"epochs": 6, "seed": 1}}
    facts = {"epochs": 6, "kept_epoch": 2, "seconds": 39.6, "device": "two cores"}
    load_bundle(exported).changed(parameters=trained, libraries={"keras": "3.13"}, training=facts).save()
    (exported / "history.csv").write_text(HISTORY)
    write_json(space.models / "champion.json", {"id": "aaa"})
    prepare(space, "data-of-bbb", {"a": 10, "b": 12, "c": 3})
    log = space.state / "logs" / "n1" / "train.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"step {i}\n" for i in range(1000)) + "error: the loss is not <finite>\n")
    return space


STAGES = [
    StageRun("prepare", "Cached", "nothing it depends on has changed", 0.2),
    StageRun("train", "Completed", "ran", 60.0),
    StageRun("evaluate", "Completed", "ran", 20.0),
]


def a_night(action: str = "promote", **values) -> Night:
    judgement = Judgement(Verdict(action, ["better by 1.82 points"], COMPARISON), CHALLENGER, CHAMPION)
    return Night(**({"run": "n1", "judgement": judgement, "stages": STAGES, "started": STARTED} | values))


def stopped(state: notify.State, reason: str, run: str = "n1", **values) -> Night:
    return Night(run, stopped=state, reason=reason, started=STARTED, next_run=NEXT, **values)


def told(workspace: Workspace, night: Night) -> tuple[Page, list[str]]:
    """Return the night's page, and what was said while it was written."""
    said = []
    pages.tell(workspace, night, said.append)
    text = (workspace.root / night.page).read_text() if night.page else ""
    return Page(text), said


def links_of(page: Page) -> list[str]:
    return [attributes["href"] for _, attributes in page.elements if "href" in attributes]


def rows_of(page: Page, heading: str) -> str:
    """Return the text of the page from a heading on, in single spaces."""
    return " ".join(page.text[page.text.index(heading) :].split())


def test_a_promoted_night_shows_both_models_side_by_side(workspace):
    (workspace.registry / "bbb" / "evaluation").mkdir(parents=True)
    write_json(workspace.models / "champion.json", {"id": "bbb"})
    page, said = told(workspace, a_night(next_run=NEXT))
    assert said == []
    assert "Model bbb is in service now" in page.text
    assert "better by 1.82 points" in page.text
    shown = rows_of(page, "Challenger and champion")
    assert "challengerbbbchampionaaadifference" in shown
    assert "Accuracy98.70%96.88%+1.82 points better" in shown
    assert "Log loss0.10130.1031-0.0018 better" in shown
    assert "Calibration error2.00%2.00%none" in shown
    assert "Accepted98.00%––" in shown
    assert "95% interval-0.26 to +3.91 points" in shown
    assert "11 images now right, 4 now wrong; McNemar's exact test: p = 0.12" in shown
    assert "points b3090.00%95.00%-5.00 c3080.00%83.00%-3.00 a30100.00%90.00%+10.00 What changed" in shown
    assert float(page.figures["accuracy"][0]) == CHALLENGER["accuracy"]
    assert "Wednesday, 25 November 2026, 02:00 CET" in page.text


def test_how_many_of_no_accepted_images_are_right_is_not_said(workspace):
    none, some = {"accepted": 0.0, "accepted_accuracy": 0.0}, {"accepted": 0.5, "accepted_accuracy": 0.75}
    for pair, expected in (
        ((none, some), "Right among the accepted–75.00%–"),
        ((none, none), "Accepted0.00%0.00%none"),
    ):
        judgement = Judgement(Verdict("hold", ["held"], COMPARISON), {**CHALLENGER, **pair[0]}, {**CHAMPION, **pair[1]})
        shown = rows_of(told(workspace, a_night(judgement=judgement))[0], "Challenger and champion")
        assert expected in shown
        assert ("Right among the accepted" in shown) == (some in pair)


def test_what_changed_since_the_champion_was_trained(workspace):
    prepare(workspace, "data-of-aaa", {"a": 10, "b": 10})
    told(workspace, a_night("hold"))  # which puts these counts on record
    prepare(workspace, "data-of-bbb", {"a": 10, "b": 12, "c": 3})
    night = a_night("hold")
    page, _ = told(workspace, night)
    assert night.changes.classes == [("c", None, 3), ("b", 10, 12)]
    assert night.changes.data == [
        "25 images in 3 classes: 23 train, 1 validation, 1 test.",
        "5 more than the champion had.",
    ]
    assert [(change.key, change.before, change.after) for change in night.changes.parameters] == [
        ("train.epochs", "12", "6"),
        ("libraries.keras", "3.12", "3.13"),
    ]
    shown = rows_of(page, "What changed")
    assert "c–3+3 b1012+2" in shown
    assert "train.epochs126" in shown
    text = markdown(night)
    assert "Parameters: train.epochs 12 → 6; libraries.keras 3.12 → 3.13" in text
    assert "Data: 25 images in 3 classes" in text


def test_the_same_data_other_data_and_data_that_are_not_on_record(workspace):
    judgement = a_night().judgement
    assert "not on record here" in " ".join(changes(workspace, judgement, "aaa").data)
    prepare(workspace, "data-of-aaa", {"a": 10, "b": 12, "c": 3})
    assert changes(workspace, judgement, "aaa").data == ["The same as the champion's: 25 images in 3 classes."]
    prepare(workspace, "other", {"a": 10, "b": 12, "c": 3})
    assert changes(workspace, judgement, "aaa").data[1].startswith("Each class has as many as the champion's had")
    load_bundle(workspace.registry / "aaa").changed(test_digest="t0").save()
    assert changes(workspace, judgement, "aaa").data[1] == "The test set is another one than the champion's."
    shutil.rmtree(workspace.prepared)
    assert changes(workspace, judgement, "aaa").data == []


def test_a_first_model_has_no_other_beside_it(workspace):
    judgement = Judgement(Verdict("promote", ["the first model"]), CHALLENGER, None)
    page, said = told(workspace, a_night(judgement=judgement))
    assert said == []
    assert "There was no model in service to compare with." in page.text
    assert "Challenger" not in page.text
    assert "Parameters and libraries" not in page.text
    assert "25 images in 3 classes" in page.text


def test_a_held_and_a_quiet_night_say_what_stays_in_service(workspace):
    page, _ = told(workspace, a_night("hold"))
    assert "Model bbb was held, aaa stays in service" in page.text
    quiet = [StageRun("train", "Cached", "nothing it depends on has changed", 0.3)]
    night = a_night("hold", stages=quiet)
    page, _ = told(workspace, night)
    assert night.state == "unchanged"
    assert "Nothing new, aaa stays in service" in page.text


def test_curves_are_drawn_from_the_history(workspace):
    page, _ = told(workspace, a_night())
    drawings = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert drawings == ["Gain +1.82%, interval -0.26% to +3.91%", "Loss over epochs", "Accuracy over epochs"]
    assert "6 epochs in 39.6 s on two cores; its weights are those of epoch 2" in page.text


def test_stages_are_bars_on_one_axis_of_time(workspace):
    page, _ = told(workspace, a_night())
    bars = [a for tag, a in page.elements if tag == "i" and "margin-left" in a.get("style", "")]
    assert [bar.get("class") for bar in bars] == ["quiet", None, None]
    widths = [float(re.search(r";width:([\d.]+)%", bar["style"])[1]) for bar in bars]
    starts = [float(re.search(r"margin-left:([\d.]+)%", bar["style"])[1]) for bar in bars]
    assert widths[1] == pytest.approx(3 * widths[2], rel=0.01)
    assert starts[2] == pytest.approx(starts[1] + widths[1], abs=0.02)


def test_a_failed_night_shows_the_stage_the_error_and_the_end_of_its_log(workspace):
    stages = [STAGES[0], StageRun("train", "Failed", "Task run encountered an exception", 7.0)]
    night = stopped("failed", "train: the loss is not <finite>", stages=stages)
    page, said = told(workspace, night)
    assert said == []
    assert "Failed at train" in page.text
    assert "starts again with train; stages that were done before it are kept" in page.text
    assert "The next run, on Wednesday, 25 November 2026, 02:00 CET" in page.text
    shown = rows_of(page, "The last lines of train")
    assert "step 999 error: the loss is not <finite>" in shown
    assert "step 981" in shown
    assert "step 980" not in shown
    assert "aaa" in page.text
    # What differs from the champion is what one looks for now; without a verdict by params.yaml.
    assert {change.key.split(".")[0] for change in night.changes.parameters} == {"train", "model", "prepare"}
    assert "train.epochs129" in rows_of(page, "Parameters and libraries")
    assert "../logs/n1/train.log" in links_of(page)


def test_a_step_that_is_no_stage_can_fail_after_the_verdict(workspace):
    (workspace.state / "logs" / "n1" / "predict.log").write_text("error: no memory\n")
    page, _ = told(
        workspace, a_night(stopped="failed", reason="predict: no memory (log: .nightly/logs/n1/predict.log)")
    )
    assert "Failed at predict" in page.text
    assert "The verdict came before the night ended otherwise: promote, because better by 1.82 points" in page.text
    assert "The last lines of predict" in page.text


def test_a_failure_beside_all_stages_has_no_log(workspace):
    page, _ = told(workspace, stopped("failed", "the disk is full: free some space"))
    assert "Failed" in page.text
    assert "The last lines" not in page.text
    assert "starts again;" in page.text


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_promotion_is_told_also_if_the_night_does_not_reach_its_end(workspace, monkeypatch, state):
    sent = []
    monkeypatch.setattr(notify, "notify", lambda addresses, events, *message: sent.append(events) or [])
    write_json(workspace.models / "champion.json", {"id": "bbb"})
    page, _ = told(workspace, a_night(stopped=state, reason="predict: too many files"))
    assert "promote" in sent[0]
    assert "before that, bbb was promoted: better by 1.82 points" in page.text


def test_what_a_killed_run_had_left_is_told_by_the_next(workspace, monkeypatch):
    sent = []
    monkeypatch.setattr(notify, "notify", lambda addresses, events, *message: sent.append((events, *message)) or [])
    notify.record_night(workspace, "n0", "killed", STARTED, "killed: process 7 on here ended without a word")
    page, _ = told(workspace, a_night("hold", mended=["run 'x' was Running and is now Crashed"]))
    assert "Before it: run 'x' was Running and is now Crashed" in page.text
    assert "killed: process 7 on here ended without a word" in rows_of(page, "The last nights")
    [(events, title, body)] = sent
    assert events == ["hold", "recovery"]
    assert title.endswith("held after a failure")
    assert "Before it: run 'x' was Running" in body
    (workspace.state / "nights" / "latest.html").write_text("the night's")
    told(workspace, stopped("skipped", "busy", "n2-skipped"))
    assert (workspace.state / "nights" / "latest.html").read_text() == "the night's"
    assert (workspace.state / "nights" / "n2-skipped.html").is_file()


def test_interrupted_and_skipped_nights_have_a_page_too(workspace):
    stages = [STAGES[0], StageRun("train", "Interrupted", "will go on", 7.0)]
    page, said = told(workspace, stopped("interrupted", "train will go on from its checkpoint", stages=stages))
    assert said == []
    assert "The last lines" not in page.text
    assert "Interrupted: the next run goes on" in page.text
    assert "What was done is saved" in page.text
    shutil.rmtree(workspace.prepared)  # another run is at work on it
    night = stopped("skipped", "the workspace is busy")
    page, said = told(workspace, night)
    assert said == []
    assert "the workspace is busy" in page.text
    assert "Nothing was touched" in page.text
    assert night.changes is None


def test_predictions_drift_intake_and_publication_are_told(workspace):
    drift = {"level": "warning", "sentences": ["These images are darker."]}
    facts = {"statuses": {"ok": 39, "truncated": 1}, "labels": {"a": 30, "b": 9}, "accepted": 35, "drift": drift}
    table = workspace.predictions / "n1" / "predictions.parquet"
    table.mkdir(parents=True)
    (table.parent / "report.html").write_text("gallery")
    intake = Intake("n1-abc.tar", "abc", {"a": 3}, 0, "n1.jsonl", {"truncated": 1}, ["a/x.png: cut off"])
    night = a_night(
        predictions=Predictions("39 of 40 files classified", workspace.shown(table), facts),
        intake=intake,
        published=Published("postponed", "the remote is full", "49e79040aa11", "", ["free some space there"]),
    )
    page, _ = told(workspace, night)
    assert page.text.count("These images are darker.") == 1
    assert "accepted35" in rows_of(page, "Predictions")
    assert "a/x.png: cut off" in page.text
    assert page.text.count("committed as 49e79040aa; the rest is postponed: the remote is full") == 2
    assert "free some space there" in page.text
    assert "../../data/predictions/n1/report.html" in links_of(page)
    text = markdown(night)
    for words in ("Inbox: Took in 3 images", "- These images are darker.", "Published: committed as", "nights/n1.html"):
        assert words in text
    assert "Inbox" not in markdown(a_night(intake=Intake()))
    assert "Inbox" not in pages.message(a_night(intake=Intake()), recovered=False)[1]
    title, body = pages.message(night, recovered=False)
    assert title.endswith("promoted")
    for words in ("Promoted: better by 1.82 points", "These images are darker.", "Took in 3 images", "Page: .nightly"):
        assert words in body


def test_links_lead_to_what_is_there_and_the_report_to_where_it_stays(workspace):
    (workspace.root / "data" / "card.html").write_text("card")
    page, _ = told(workspace, a_night("hold"))
    links = links_of(page)
    assert "../../models/evaluation/report.html" in links
    kept = workspace.registry / "bbb" / "evaluation"
    kept.mkdir(parents=True)
    (kept / "report.html").write_text("report")
    page, _ = told(workspace, a_night())
    links = links_of(page)
    assert "../../models/registry/bbb/evaluation/report.html" in links
    for link in links:
        if not link.startswith("#"):
            assert (workspace.state / "nights" / unquote(link)).exists(), link


def test_the_last_nights_are_listed_with_their_pages(workspace):
    for number in range(12):
        told(workspace, stopped("skipped", f"reason {number}", run=f"n {number}") if number else a_night())
    page, _ = told(workspace, a_night("hold", run="n-last"))
    shown = rows_of(page, "The last nights")
    assert shown.index("held: better") < shown.index("reason 11") < shown.index("reason 3")
    assert "reason 2 " not in shown
    assert "n%2011.html" in links_of(page)
    assert "n-last.html" not in links_of(page)
    nights = workspace.state / "nights"
    assert (nights / "latest.html").read_text() == (nights / "n-last.html").read_text()


def test_hostile_names_are_text_and_the_page_loads_nothing(workspace):
    for number, name in enumerate(HOSTILE):
        challenger = figures("bbb", 0.9, {name: 0.5})
        champion = figures("aaa", 0.8, {name: 0.4})
        prepare(workspace, f"d{number}", {name: 3})
        judgement = Judgement(Verdict("promote", [name], COMPARISON), challenger, champion)
        facts = {"statuses": {name: 1}, "labels": {name: 1}, "drift": {"level": name, "sentences": [name]}}
        intake = Intake("x.tar", "x", {name: 1}, examples=[name])
        night = a_night(
            judgement=judgement,
            predictions=Predictions(name, None, facts),
            intake=intake,
            stages=[StageRun(name, "Completed", name, 1.0)],
            published=Published("done", "", "1234567890", name, [name]),
        )
        page, said = told(workspace, night)
        assert said == []
        assert page.text.count(name) >= 12
        assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.elements}
        assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
        assert not re.search(r"https?:|url\(|@import", (workspace.root / night.page).read_text())


def test_a_judgement_of_few_figures_is_enough(workspace):
    few = [{"model_id": name, "accuracy": 0.9, "per_class": {"a": {}, "b": {}}} for name in ("bbb", "aaa")]
    for comparison in (None, {"gain": 0.0}, {"gain": 0.01, "unpaired": "the champion's predictions are missing"}):
        night = a_night(judgement=Judgement(Verdict("hold", ["as good"], comparison), *few), stages=[])
        page, said = told(workspace, night)
        assert said == []
        assert "Accuracy90.00%90.00%none" in rows_of(page, "Challenger and champion")
    assert "not compared: the champion's predictions are missing" in page.text


def test_what_goes_wrong_is_said_and_fails_no_night(workspace, monkeypatch):
    (workspace.prepared / "prepared.json").write_text("{")
    sent = []
    monkeypatch.setattr(notify, "notify", lambda addresses, events, *message: sent.append(events) or ["not sent"])
    said = []
    pages.tell(workspace, a_night(), said.append)
    assert said[0].startswith("the page of this night could not be written: JSONDecodeError")
    assert said[1:] == ["not sent"]
    assert sent == [["promote"]]
    assert [record.run for record in notify.nights(workspace)] == ["n1"]


def test_recovery_is_told_once_and_only_after_a_failure(workspace, monkeypatch):
    sent = []
    monkeypatch.setattr(notify, "notify", lambda addresses, events, *message: sent.append((events, *message)) or [])
    quiet = [StageRun("train", "Cached", "nothing it depends on has changed", 0.3)]
    for night in (
        stopped("failed", "train: no memory"),
        stopped("skipped", "busy"),
        a_night("hold", stages=quiet),
        a_night("hold", stages=quiet),
    ):
        told(workspace, night)
    assert [events for events, *_ in sent] == [["failure"], ["recovery"]]
    assert sent[0][1].endswith(": failed")
    assert sent[0][2].startswith("Failed: train: no memory\nIn service: aaa\n")
    assert sent[1][1].endswith("well again after a failure")


def test_addresses_of_the_parameters_reach_neither_page_nor_record(workspace):
    # Whatever else is wrong in the file: that may be what the night failed for.
    workspace.params.write_text("train: {epochs: many}\nretrain: {notify: ['nosuch://s3cr3t'], wrong: 1}\n")
    _, said = told(workspace, stopped("skipped", "busy"))
    assert said == []
    _, said = told(workspace, a_night())
    assert said == [
        "notification failed: retrain.notify, address 1 (nosuch://…): apprise can't make sense of it: "
        "see its list of services"
    ]
    workspace.params.write_text("retrain: {notify: [s3cr3t]}\n")
    _, said = told(workspace, a_night())
    assert len(said) == 1
    assert said[0].startswith("nobody could be notified: ")
    written = [path.read_text() for path in workspace.state.rglob("*") if path.suffix in (".html", ".jsonl", ".json")]
    assert len(written) >= 3
    assert "s3cr3t" not in "".join([*written, *said])


def test_a_night_that_failed_for_its_parameters_has_a_page(workspace):
    workspace.params.write_text("train: {epochs: many}\n")
    page, said = told(workspace, stopped("failed", "params.yaml: 'train.epochs': input should be a valid integer"))
    assert said == []
    assert "'train.epochs': input should be" in page.text


def test_counts_are_taken_once_per_data_set(workspace):
    told(workspace, a_night())
    [record] = (workspace.state / "nights" / "data").iterdir()
    assert read_json(record) == {"a": 10, "b": 12, "c": 3}
    (workspace.prepared / "manifest.parquet").unlink()
    assert told(workspace, a_night())[1] == []


def test_the_pages_lie_where_neither_git_nor_dvc_looks(workspace):
    night = a_night()
    told(workspace, night)
    root = Path(__file__).parents[1]
    assert Path(night.page).parts[0] + "/" in (root / ".gitignore").read_text().splitlines()
    assert Path(night.page).parts[0] in (root / ".dvcignore").read_text().splitlines()
