"""The doctor: a healthy workspace has nothing, and whatever breaks is found by the one check that is for it."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from flows import checks, doctor, model_checks, server_checks, stages
from flows import notify as records
from flows.doctor import CHECKS, Check, as_json, examine, exit_code, hours, show
from flows.findings import Case, Finding, fail, ok, output, warn
from flows.settings import read_settings
from flows.workspace import Workspace, locked
from tasks import promote
from tasks.bundle import load_bundle
from tasks.errors import NightlyError
from tasks.files import read_json, write_json
from tests.miniature import Miniature, export
from tests.object_store import s3
from tests.test_reconcile import note, on_server, states

#: What is about this machine and not about the workspace.
ELSEWHERE = {"software", "telemetry", "server", "runs", "slots", "schedule"}


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def write_engine(path: Path, classes: int) -> None:
    """Give the bundle at ``path`` an OpenVINO engine that is sure of nothing."""
    from tasks.engines import import_openvino

    openvino = import_openvino()
    from openvino import opset13 as ops

    images = ops.parameter([-1, 8, 8, 3], np.uint8, "images")
    means = ops.reduce_mean(ops.convert(images, "f32"), ops.constant(np.array([1, 2, 3])), keep_dims=False)
    columns = ops.unsqueeze(ops.multiply(means, ops.constant(np.float32(0))), ops.constant(np.array([1])))
    scores = ops.matmul(columns, ops.constant(np.ones((1, classes), np.float32)), False, False)
    bundle = load_bundle(path)
    bundle.openvino_file.parent.mkdir(parents=True)
    openvino.save_model(openvino.Model([ops.softmax(scores, 1)], [images]), bundle.openvino_file, False)
    facts = {"openvino-float32": {"agreement": 1.0, "images_per_second": 1.0, "offered": True}}
    bundle.changed(path=path, engines=facts).save()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A workspace with two models, one in service, all of it versioned and in a remote; never changed by a test."""
    root = tmp_path_factory.mktemp("sound") / "workspace"
    Miniature(root)
    workspace = Workspace(root)
    write_json(workspace.state / "empty.json", {})
    (root / ".gitignore").write_text(".nightly\n")
    (root.parent / "remote").mkdir()
    for line in (
        ("config", "core.analytics", "false"),
        ("remote", "add", "--quiet", "--default", "storage", str(root.parent / "remote")),
    ):
        output([sys.executable, "-m", "dvc", *line], root, 60)
    for model_id in ("aaa", "bbb"):
        exported, evaluation = export(root.parent / model_id, model_id)
        write_engine(exported, 2)
        promote.register(exported, evaluation, workspace.registry)
        stages.track(root, workspace.registry / model_id)
        promote.promote(workspace.models, model_id, promote.Verdict("promote", ["better"]))
    records.record_night(workspace, "20260101-020000", "promoted", datetime.now(UTC), "promoted")
    output([sys.executable, "-m", "dvc", "push", "--quiet"], root, 60)
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    return root


@pytest.fixture
def workspace(sound, tmp_path, monkeypatch) -> Workspace:
    """A copy of it, with no server configured."""
    root = tmp_path / "workspace"
    shutil.copytree(sound, root, symlinks=True)
    shutil.copytree(sound.parent / "remote", tmp_path / "remote")
    config = root / ".dvc" / "config"
    config.write_text(config.read_text().replace(str(sound.parent), str(tmp_path)))
    git(root, "commit", "--quiet", "--all", "--allow-empty", "--message", "moved")
    monkeypatch.setattr("flows.server.server_url", lambda: None)
    return Workspace(root)


def look(check: str, workspace: Workspace, max_age_hours: float | None = None) -> Finding:
    """Return what one check finds, without asking DVC for its settings."""
    settings = read_settings(workspace.params)
    dvc = {"core.analytics": "false", "core.remote": "storage", "remote.storage.url": "../../remote"}
    return CHECKS[check].look(Case(workspace, settings, dvc, max_age_hours))


def states_of(findings: list[Finding]) -> dict[str, str]:
    """Return what is not as it should be, without what is not the workspace's."""
    return {one.name: one.state for one in findings if one.state != "ok" and one.name not in ELSEWHERE}


@pytest.mark.slow
def test_a_healthy_workspace_has_nothing_and_is_looked_at_in_15_seconds(workspace):
    began = time.monotonic()
    findings = examine(workspace, fix=True, max_age_hours=36)
    assert time.monotonic() - began < 15
    assert states_of(findings) == {}
    assert exit_code(findings) == 0
    assert [one.name for one in findings] == list(CHECKS)
    assert all(one.text and "\n" not in one.text for one in findings)
    assert all(one.remedy for one in findings if one.state != "ok")
    assert not any(one.fixed for one in findings)
    assert {one.name: one.text for one in findings}["champion"] == "bbb classifies with openvino-float32"


# --- one thing broken


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def tear_lock_file(workspace: Workspace) -> None:
    (workspace.root / "dvc.lock").write_text("schema: '2.0'\nsta")
    git(workspace.root, "add", ".")
    git(workspace.root, "commit", "--message", "torn")


def forget_owner(workspace: Workspace) -> None:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = {"command": "nightly retrain", "pid": dead_process(), "host": os.uname().nodename, "since": since}
    write_json(workspace.state / "owner.json", owner)


def leave_partial(workspace: Workspace) -> None:
    (workspace.state / f".x.partial-{dead_process()}").touch()


def params(text: str):
    def write(workspace: Workspace) -> None:
        workspace.params.write_text(text)
        git(workspace.root, "commit", "--all", "--message", "parameters")

    return write


def lose_champion(workspace: Workspace) -> None:
    weights = workspace.registry / "bbb" / "engines" / "openvino" / "model.bin"
    weights.chmod(0o644)
    weights.write_bytes(b"")
    model = weights.with_suffix(".xml")
    model.chmod(0o644)
    model.write_text(model.read_text()[:500])


def lose_model(workspace: Workspace) -> None:
    shutil.rmtree(workspace.registry / "aaa")
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    shutil.rmtree(workspace.root.parent / "remote" / "files")


def lose_remote(workspace: Workspace) -> None:
    shutil.rmtree(workspace.root.parent / "remote")
    remote = workspace.root / ".dvc" / "config"
    remote.write_text(remote.read_text().replace("/remote", "/not/mounted/remote"))
    git(workspace.root, "commit", "--all", "--message", "remote")


def grow_old(workspace: Workspace) -> None:
    for file in (workspace.state / "nights.jsonl", workspace.models / "ledger.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        old = (datetime.now(UTC) - timedelta(hours=40)).isoformat(timespec="seconds")
        changed = [line | {key: old for key in ("ended", "time") if key in line} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))
    git(workspace.root, "commit", "--all", "--message", "old")


def leave_git(workspace: Workspace) -> None:
    git(workspace.root, "checkout", "--quiet", "--detach")


#: What is broken -> the state of the only check that minds, what it says, and whether --fix mends it.
BREAKS = {
    "parameters": (params("retrain: {minimum_gian: 0.1}\n"), "fail", "did you mean 'minimum_gain'", False),
    "gpu": (params("train: {require_gpu: true}\n"), "fail", "no GPU is present", False),
    "notifications": (params("retrain: {notify: ['${NOWHERE}']}\n"), "fail", "NOWHERE is not set", False),
    "git": (leave_git, "warn", "no branch is checked out", False),
    "dvc": (tear_lock_file, "fail", "dvc.lock is torn, which blocks DVC", True),
    "lock": (forget_owner, "warn", "which was killed; the lock itself is free", True),
    "leftovers": (leave_partial, "warn", ".nightly/.x.partial-", True),
    "champion": (lose_champion, "fail", "bbb does not classify: ", False),
    "registry": (lose_model, "fail", "aaa: neither here nor in DVC's cache or remote", False),
    "remote": (lose_remote, "fail", "is not there or may not be written", False),
    "last success": (grow_old, "fail", "more than 36 h ago", False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_found_by_one_check_and_mended_where_that_is_safe(workspace, name):
    damage, state, text, mended = BREAKS[name]
    damage(workspace)
    findings = examine(workspace, max_age_hours=36)
    assert states_of(findings) == {name: state}
    [finding] = [one for one in findings if one.name == name]
    assert text in finding.text
    assert finding.remedy
    assert exit_code(findings) == (state == "fail")
    if mended:
        findings = examine(workspace, fix=True, max_age_hours=36)
        [finding] = [one for one in findings if one.name == name]
        assert (finding.state, bool(finding.fixed)) == ("ok", True)
        # What was mended is a change that nobody has committed yet.
        assert set(states_of(findings)) <= {"git"}


# --- single checks


def test_versions_are_compared_with_what_is_needed_and_with_the_lock(workspace, monkeypatch):
    assert look("software", workspace).state == "ok"
    lock = workspace.root / "requirements.lock"
    lock.write_text(f"numpy=={metadata.version('numpy')} \\\n    --hash=x\nprefect==3.0.0 ; python_version > '3'\n")
    found = look("software", workspace)
    assert found.state == "warn"
    assert f"prefect {metadata.version('prefect')} (3.0.0)" in found.text
    assert "numpy" not in found.text
    monkeypatch.setattr(checks, "_version", lambda name: None if name == "dvc" else "0.1")
    found = look("software", workspace)
    assert found.state == "fail"
    assert "dvc missing (" in found.text
    assert "fastapi 0.1" not in found.text, "it is below its upper bound"


def test_telemetry_that_is_on_is_named(workspace):
    from prefect.settings import PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings

    assert look("telemetry", workspace) == ok("off: Prefect, DVC, OpenVINO")
    with temporary_settings({PREFECT_SERVER_ANALYTICS_ENABLED: True}):
        found = CHECKS["telemetry"].look(Case(workspace))
    assert found.text == "Prefect's and DVC's is on"
    assert "dvc config core.analytics false" in found.remedy


def test_git_is_asked_for_a_repository_a_branch_and_what_blocks_a_commit(workspace):
    root, index_lock = workspace.root, workspace.root / ".git" / "index.lock"
    assert look("git", workspace).text.endswith("everything is committed")
    (root / "new").touch()
    assert "1 files are changed or new" in look("git", workspace).text
    index_lock.touch()
    assert look("git", workspace).state == "warn", "it may be in use"
    os.utime(index_lock, (time.time() - 3600,) * 2)
    assert look("git", workspace).state == "fail"
    index_lock.unlink()
    workspace.params.write_text("retrain: {publish: push}\n")
    assert "has no upstream" in look("git", workspace).text
    git(root, "checkout", "--quiet", "--detach")
    assert look("git", workspace).state == "fail"
    shutil.rmtree(root / ".git")
    assert "git init" in look("git", workspace).remedy


def test_dvc_in_use_is_said_with_the_process(workspace):
    write_json(workspace.root / ".dvc" / "tmp" / "rwlock", {"write": {"x": {"pid": os.getpid(), "cmd": "dvc repro"}}})
    assert look("dvc", workspace).text == f"in use by 'dvc repro' (process {os.getpid()})"


def test_a_cache_that_may_not_be_written_is_found(workspace, monkeypatch):
    cache = workspace.root / ".dvc" / "cache"
    monkeypatch.setattr(checks.os, "access", lambda path, mode: path != cache)
    assert look("dvc", workspace).text == f"the cache {cache} may not be written"


def test_the_lock_is_held_by_the_living(workspace):
    assert look("lock", workspace).text == "nobody is at work here"
    with locked(workspace, "nightly retrain"):
        found = look("lock", workspace)
        assert (found.state, f"'nightly retrain' (process {os.getpid()} on" in found.text) == ("ok", True)
        owner = read_json(workspace.state / "owner.json")
        write_json(workspace.state / "owner.json", owner | {"host": "other"})
        assert "as far as can be told from here" in look("lock", workspace).text
        write_json(workspace.state / "owner.json", owner | {"since": "2020-01-01T00:00:00+00:00"})
        assert "which was killed" in look("lock", workspace).text, "this process started later"


def test_room_on_the_disk_is_compared_with_what_the_last_run_made(workspace, monkeypatch):
    def free(size: float) -> None:
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, int(size)))

    free(4.1 * 2**30)
    assert look("disk", workspace).state == "ok"
    free(2**30)
    found = look("disk", workspace)
    assert (found.state, "needs about 2.1 GB" in found.text) == ("fail", True)
    workspace.prepared.mkdir(parents=True)
    (workspace.prepared / "images").write_bytes(bytes(1000))
    free(5000)
    assert look("disk", workspace).state == "ok"
    free(3000)
    assert look("disk", workspace).state == "warn"
    free(1999)
    assert look("disk", workspace).state == "fail"


def test_a_gpu_that_is_asked_for_must_be_seen_by_the_library_too(workspace, monkeypatch):
    workspace.params.write_text("train: {require_gpu: true}\n")
    monkeypatch.setattr(checks, "gpu_present", lambda: True)

    def no_gpu(*arguments):
        raise NightlyError("train.require_gpu is true, but tensorflow sees no GPU")

    monkeypatch.setattr(checks, "python", no_gpu)
    assert look("gpu", workspace).text == "train.require_gpu is true, but tensorflow sees no GPU"
    monkeypatch.setattr(checks, "python", lambda *arguments: "1 × A, 550.1\n")
    assert look("gpu", workspace) == ok("1 × A, 550.1")


def test_the_champion_is_looked_for_from_its_pointer_to_its_answers(workspace):
    pointer, model = workspace.models / "champion.json", workspace.registry / "bbb"
    bundle = read_json(model / "bundle.json")
    (model / "bundle.json").unlink()
    write_json(model / "bundle.json", bundle | {"classes": ["a", "b", "c"]})
    assert "gives no probabilities of 3 classes" in look("champion", workspace).text
    shutil.rmtree(model)
    assert "is missing: fetch it with 'dvc pull" in look("champion", workspace).text
    pointer.unlink()
    found = look("champion", workspace)
    assert (found.state, found.remedy) == ("fail", "nightly rollback bbb")
    (workspace.models / "ledger.jsonl").unlink()
    assert look("champion", workspace).state == "warn"
    pointer.write_text("{")
    assert "is damaged" in look("champion", workspace).text


def test_a_pruned_model_is_restorable_from_the_cache_or_the_remote(workspace):
    shutil.rmtree(workspace.registry / "aaa")
    assert look("registry", workspace) == ok("2 models, 1 of them only in DVC's storage")
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    assert look("registry", workspace).state == "ok"
    case = Case(workspace)  # no remote
    found = model_checks.restorable(case)
    assert found.text == "aaa: neither here nor in DVC's cache, and there is no remote"
    (workspace.registry / "bbb.dvc").unlink()
    (workspace.registry / "aaa.dvc").unlink()
    assert look("registry", workspace).text == "bbb: only here, DVC knows nothing of it"


def test_a_remote_that_is_missing_is_worth_a_word_and_one_made_by_the_first_push_is_all_right(workspace):
    shutil.rmtree(workspace.root.parent / "remote")
    assert look("remote", workspace).text.endswith("made with the first push")
    assert model_checks.remote(Case(workspace)).state == "warn"
    assert "has no address" in model_checks.remote(Case(workspace, dvc={"core.remote": "storage"})).text


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("The path 'remote://storage' does not exist: bucket/prefix", "ok"),
        ("The path 'remote://storage' does not exist: The specified bucket does not exist", "fail"),
        ("unexpected error - Could not connect to the endpoint URL", "fail"),
        ("no answer within 10 s", "fail"),
    ],
)
def test_a_store_that_answers_is_told_from_one_that_does_not(workspace, monkeypatch, said, state):
    def dvc(root, *arguments, limit_seconds=20.0):
        assert (arguments, limit_seconds) == (("list-url", "remote://storage"), 10)
        raise NightlyError(said)

    monkeypatch.setattr(model_checks, "dvc", dvc)
    found = model_checks.remote(
        Case(workspace, dvc={"core.remote": "storage", "remote.storage.url": "s3://bucket/prefix"})
    )
    assert found.state == state


@pytest.mark.slow
def test_an_s3_remote_is_asked_itself(workspace, monkeypatch):
    with s3() as bucket:
        places = {"empty": f"{bucket}/prefix", "nowhere": f"{bucket}-not-made/prefix", "down": f"{bucket}/prefix"}
        for name, url in places.items():
            output([sys.executable, "-m", "dvc", "remote", "add", name, url], workspace.root, 60)
        set_down = ("remote", "modify", "down", "endpointurl", "http://127.0.0.1:9")
        output([sys.executable, "-m", "dvc", *set_down], workspace.root, 60)
        found = {
            name: model_checks.remote(Case(workspace, dvc={"core.remote": name, f"remote.{name}.url": url}))
            for name, url in places.items()
        }
    assert {name: one.state for name, one in found.items()} == {"empty": "ok", "nowhere": "fail", "down": "fail"}
    assert "bucket does not exist" in found["nowhere"].text


def test_the_last_success_is_that_of_a_night_and_no_persons_decision(workspace):
    assert look("last success", workspace, 36).state == "ok"
    grow_old(workspace)
    assert look("last success", workspace).state == "ok"
    assert look("last success", workspace, 36).state == "fail"
    records.record_night(workspace, "x", "failed", datetime.now(UTC), "failed")
    assert look("last success", workspace, 36).state == "fail"
    promote.rollback(workspace.models, "aaa", "the nights fail, but this one is good")
    assert look("last success", workspace, 36).state == "fail"
    records.record_night(workspace, "y", "unchanged", datetime.now(UTC), "nothing new")
    assert look("last success", workspace, 36).state == "ok"
    (workspace.state / "nights.jsonl").unlink()
    assert look("last success", workspace).state == "warn"
    assert look("last success", workspace, 36).state == "fail"


def test_a_night_that_a_wrong_clock_put_in_the_future_is_no_success(workspace):
    grow_old(workspace)
    ahead = {"run": "x", "state": "promoted", "seconds": 1.0, "headline": "promoted"}
    ahead |= {name: (datetime.now(UTC) + timedelta(days=400)).isoformat() for name in ("started", "ended")}
    with (workspace.state / "nights.jsonl").open("a") as file:
        file.write(json.dumps(ahead) + "\n")
    assert look("last success", workspace, 36).state == "fail"


# --- the command


def test_a_check_that_breaks_or_hangs_keeps_no_other_from_answering(workspace, monkeypatch):
    def broken(case: Case) -> Finding:
        raise KeyError("x")

    def full(case: Case) -> Finding:
        raise OSError(28, "No space left on device", "/here")

    def hanging(case: Case) -> Finding:
        time.sleep(30)
        return ok("late")

    asked = {"a": Check(broken), "b": Check(full), "c": Check(hanging, 0.2), "d": Check(lambda case: ok("x"))}
    monkeypatch.setattr(doctor, "CHECKS", asked)
    findings = examine(workspace)
    assert [one.state for one in findings] == ["fail", "fail", "fail", "ok"]
    assert "KeyError: 'x'" in findings[0].text
    assert "the disk is full (/here)" in findings[1].text
    assert findings[2].text == "no answer within 0.2 s"


def test_fix_mends_only_what_is_wrong_and_says_so(workspace, monkeypatch):
    sick, calls = [True], []

    def mend(workspace: Workspace) -> str:
        calls.append("mended")
        sick[0] = False
        return "gave it tea"

    def unable(workspace: Workspace) -> str:
        raise NightlyError("not while the workspace is busy")

    asked = {
        "well": Check(lambda case: ok("x"), mend=mend),
        "sick": Check(lambda case: fail("ill", "tea") if sick[0] else ok("well again"), mend=mend),
        "stays": Check(lambda case: warn("ill", "time"), mend=unable),
        "left": Check(lambda case: warn("ill", "time")),
    }
    monkeypatch.setattr(doctor, "CHECKS", asked)
    assert calls == []
    findings = {one.name: one for one in examine(workspace, fix=True)}
    assert calls == ["mended"]
    assert findings["sick"] == Finding("sick", "ok", "well again", fixed="gave it tea")
    assert findings["stays"].fixed == "nothing: not while the workspace is busy"
    assert findings["left"].fixed == ""


def test_nothing_is_mended_while_somebody_is_at_work(workspace):
    leave_partial(workspace)
    with locked(workspace, "nightly retrain"), pytest.raises(NightlyError, match="not while the workspace is busy"):
        CHECKS["leftovers"].mend(workspace)
    assert look("leftovers", workspace).state == "warn"


def test_findings_are_shown_as_lines_and_as_json(capsys):
    findings = [Finding("git", "ok", "clean"), Finding("disk", "fail", "full", "tidy up", "nothing: [no]")]
    show(findings, Console(width=80, force_terminal=False))
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()] == [
        ["✓", "git", "clean"],
        ["✗", "disk", "full"],
        ["fixed:", "nothing:", "[no]"],
        ["→", "tidy", "up"],
    ]
    assert json.loads(as_json(findings))[1] == {
        "name": "disk",
        "state": "fail",
        "text": "full",
        "remedy": "tidy up",
        "fixed": "nothing: [no]",
    }
    assert exit_code(findings) == 1


@pytest.mark.parametrize(("age", "expected"), [("36h", 36), ("90m", 1.5), ("2d", 48), ("1.5", 1.5)])
def test_an_age_is_read_as_people_write_it(age, expected):
    assert hours(age) == expected


@pytest.mark.parametrize("age", ["", "h", "-3h", "36 hours", "1w"])
def test_another_age_is_refused(age):
    with pytest.raises(NightlyError, match="--max-age must be a number of hours"):
        hours(age)


def test_a_program_that_hangs_or_fails_is_one_line(tmp_path):
    with pytest.raises(NightlyError, match=r"^no answer within 0 s$"):
        output([sys.executable, "-c", "import time; time.sleep(30)"], tmp_path, 0.1)
    with pytest.raises(NightlyError, match=r"^ended with exit code 3$"):
        output([sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path, 10)
    program = "import sys; print('ERROR: it is broken', 'see somewhere', sep='\\n', file=sys.stderr); sys.exit(1)"
    with pytest.raises(NightlyError, match=r"^it is broken$"):
        output([sys.executable, "-c", program], tmp_path, 10)


# --- the server


@pytest.fixture
def on(workspace, server, monkeypatch) -> Workspace:
    """The workspace with a real server."""
    monkeypatch.setattr("flows.server.server_url", lambda: server)
    return workspace


@pytest.mark.slow
def test_a_server_that_answers_and_one_that_does_not(on, monkeypatch):
    found = look("server", on)
    assert (found.state, metadata.version("prefect") in found.text) == ("ok", True)
    monkeypatch.setattr("prefect.client.orchestration.SyncPrefectClient.client_version", lambda self: "3.1.0")
    assert look("server", on).state == "warn"
    monkeypatch.setattr("prefect.client.orchestration.SyncPrefectClient.client_version", lambda self: "4.0.0")
    assert look("server", on).state == "fail"
    monkeypatch.setattr("flows.server.server_url", lambda: "http://127.0.0.1:9/api")
    found = look("server", on)
    assert (found.state, "prefect server start" in found.remedy) == ("fail", True)


@pytest.mark.slow
def test_only_the_server_check_fails_when_the_server_is_down(on, monkeypatch):
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    monkeypatch.setattr("flows.server.server_url", lambda: "http://127.0.0.1:9/api")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        found = {name: look(name, on) for name in ("server", "runs", "slots", "schedule")}
    assert {name: one.state for name, one in found.items()} == {
        "server": "fail",
        "runs": "warn",
        "slots": "warn",
        "schedule": "warn",
    }


@pytest.mark.slow
def test_runs_of_the_dead_are_found_and_set_to_crashed_and_those_of_others_only_named(on):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for left in server_checks._runs_at_work(client):
            client.delete_flow_run(left.id)
    assert look("runs", on).state == "ok"
    stranger, mine = on_server(with_task=False), on_server(with_task=False)
    assert f"'{stranger.name}'" in (found := look("runs", on)).text or f"'{mine.name}'" in found.text
    assert found.state == "warn"
    note(on, mine)
    assert "not known here" in look("runs", on).text
    note(on, mine, pid=dead_process())
    found = look("runs", on)
    assert found.state == "fail"
    assert f"'{mine.name}' is Running, but process " in found.text
    assert f"'{mine.name}' was Running and is now Crashed" in CHECKS["runs"].mend(on)
    assert states(mine)[0] == "Crashed"
    assert states(stranger)[0] == "Running"
    assert look("runs", on).state == "warn"


@pytest.mark.slow
def test_a_schedule_is_missing_paused_inactive_resumed_and_served_by_somebody(on):
    from prefect.client.orchestration import get_client
    from prefect.states import Scheduled

    from flows import serve
    from flows.settings import ServeParams

    with get_client(sync_client=True) as client:
        if left := server_checks._deployment(client):
            client.delete_deployment(left.id)
        assert look("schedule", on) == warn("the server has no schedule for retraining", "nightly serve")
        _, deployment_id = serve.register(ServeParams())
        assert look("schedule", on).state == "ok"
        client.pause_deployment(deployment_id)
        assert look("schedule", on).text == "the schedule is paused"
        CHECKS["schedule"].mend(on)
        assert look("schedule", on).state == "ok"
        [entry] = client.read_deployment(deployment_id).schedules
        client.update_deployment_schedule(deployment_id, entry.id, active=False)
        assert look("schedule", on).text == "the schedule is inactive"
        CHECKS["schedule"].mend(on)
        assert look("schedule", on).state == "ok"
        due = Scheduled(scheduled_time=datetime.now(UTC) - timedelta(hours=1))
        client.create_flow_run_from_deployment(deployment_id, state=due)
        found = look("schedule", on)
        assert (found.state, "1 runs are due and nobody starts them" in found.text) == ("fail", True)
        client.delete_deployment(deployment_id)


@pytest.mark.slow
def test_slots_that_nobody_occupies_are_given_back(on):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    from flows import serve
    from flows.settings import ServeParams

    _, deployment_id = serve.register(ServeParams())
    assert "no limit" in look("slots", on).text
    with get_client(sync_client=True) as client:
        client.request("PATCH", "/deployments/{id}", path_params={"id": deployment_id}, json={"concurrency_limit": 2})
        limit = client.read_deployment(deployment_id).global_concurrency_limit
        assert look("slots", on).text == "0 of 2 slots are taken"
        client.update_global_concurrency_limit(limit.name, GlobalConcurrencyLimitUpdate(active_slots=2))
        found = look("slots", on)
        assert (found.state, found.text) == ("fail", "2 of 2 slots are taken, but 0 runs are at work")
        assert CHECKS["slots"].mend(on) == "gave 2 slots back"
        assert look("slots", on).state == "ok"
        client.delete_deployment(deployment_id)
