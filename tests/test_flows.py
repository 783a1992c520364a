"""The flows on a real Prefect server, with a miniature of the pipeline in place of the real stages."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml

from flows.child import StageFailed
from flows.settings import ServeParams
from flows.workspace import Workspace, locked
from tasks import promote as registry
from tasks.errors import Interrupted, NightlyError
from tests.miniature import Miniature

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).parent.parent


@pytest.fixture
def workspace(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    return Miniature(tmp_path)


def retrain(task_count=6, **parameters):
    """Run the flow; return its final state and the names and states of its ``task_count`` task runs in order."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import TaskRunSort

    from flows.retrain import retrain as flow

    state = flow(**parameters, return_state=True)
    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    deadline = time.monotonic() + 20
    with get_client(sync_client=True) as client:
        while True:  # task runs reach the server through a stream of events, a little later
            runs = client.read_task_runs(
                flow_run_filter=this_run, sort=TaskRunSort.EXPECTED_START_TIME_ASC, limit=50, offset=0
            )
            if len(runs) >= task_count and all(run.state and run.state.is_final() for run in runs):
                break
            assert time.monotonic() < deadline, [(run.name, run.state_name) for run in runs]
            time.sleep(0.1)
    return state, [(run.name, run.state_name) for run in runs]


def test_a_first_night_a_night_without_news_and_a_better_model(workspace):
    from prefect.client.orchestration import get_client

    workspace.incoming("a.png", "b.png")
    state, tasks = retrain()
    night = state.result()
    assert tasks == [
        ("download", "Completed"),
        ("train", "Completed"),
        ("evaluate", "Completed"),
        ("judge", "Completed"),
        ("promote", "Promoted"),
        ("predict", "Completed"),
    ]
    assert night.champion == "m1"
    assert night.headline.startswith("promoted: the first model")
    assert (workspace.root / night.predictions.table).read_text() == "['a.png', 'b.png'] by m1"
    assert (workspace.root / night.report).is_file()
    assert (workspace.root / night.logs / "train.log").read_text().count("epoch 1") == 1
    assert (workspace.root / "models" / "registry" / "m1.dvc").is_file()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
        shown = {one.key: one for one in client.read_artifacts(limit=100, offset=0) if one.flow_run_id == run.id}
    artifact = shown.pop("night")
    assert re.fullmatch(r"retrain 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", run.name)
    assert "# Promoted: the first model" in artifact.data
    assert "| accuracy | 90.00% | – |" in artifact.data
    assert night.predictions.table in artifact.data
    assert {key: (bar.data, bar.description) for key, bar in shown.items()} == {
        "train-progress": (100.0, "epoch 1/1: from step 0")
    }

    state, tasks = retrain()
    assert tasks == [
        ("download", "Cached"),
        ("train", "Cached"),
        ("evaluate", "Cached"),
        ("judge", "Completed"),
        ("promote", "Held"),
        ("predict", "Completed"),
    ]
    assert state.result().headline == "held: m1 is the champion already"
    assert (state.name, state.message) == ("Skipped", "nothing new: held: m1 is the champion already")
    assert "is the champion already" in (workspace.root / state.result().page).read_text()
    assert len(registry.history(workspace.root / "models")) == 1

    workspace.set(id="m2", accuracy=0.95)
    state, tasks = retrain()
    assert tasks[:3] == [("download", "Cached"), ("train", "Completed"), ("evaluate", "Completed")]
    assert state.result().champion == "m2"
    assert [entry.champion_before for entry in registry.history(workspace.root / "models")] == [None, "m1"]

    workspace.set(id="m3", accuracy=0.94)
    state, _ = retrain()
    assert state.result().champion == "m2"
    assert registry.history(workspace.root / "models")[-1].action == "hold"
    assert not (workspace.root / "models" / "registry" / "m3").exists()


def test_an_empty_incoming_folder_is_skipped_and_force_runs_every_stage_for_a_chosen_one(workspace):
    state, tasks = retrain()
    assert tasks[-1] == ("predict", "Skipped")
    assert state.result().predictions.note == "data/incoming holds no images"
    (workspace.root / "album").mkdir()
    (workspace.root / "album" / "x.png").touch()
    state, tasks = retrain(predict=Path("album"), force=True)
    assert tasks[:3] == [("download", "Completed"), ("train", "Completed"), ("evaluate", "Completed")]
    assert tasks[-1] == ("predict", "Completed")
    assert state.result().predictions.note == "1 of 1 files in album classified with openvino"


def test_a_failing_stage_fails_the_run_in_its_own_words_and_nothing_is_promoted(workspace, capsys):
    workspace.set(accuracy=None)
    state, tasks = retrain(task_count=2)
    assert tasks == [("download", "Completed"), ("train", "Failed")]
    assert state.is_failed()
    assert "StageFailed: train: train.learning_rate is too large: the loss is not finite (log: " in state.message
    with pytest.raises(StageFailed, match="learning_rate is too large"):
        state.result()
    assert "Traceback" not in capsys.readouterr().err
    [log] = workspace.root.glob(".nightly/logs/*/train.log")
    assert log.read_text().count("epoch 1") == 1  # a training that failed is not tried again
    assert registry.champion_id(workspace.root / "models") is None


def test_additions_that_are_missing_or_unknown_to_dvc_are_put_right_with_an_empty_inbox(workspace):
    additions = workspace.root / "data" / "additions"
    additions.mkdir()
    (additions / "a.tar").write_bytes(b"images")
    retrain(task_count=7)
    assert (additions / "a.tar.dvc").is_file()  # as after a kill between the two
    (additions / "a.tar").unlink()  # as after a pull of git alone
    _, tasks = retrain(task_count=7)
    assert tasks[0] == ("inbox", "Completed")
    assert (additions / "a.tar").read_bytes() == b"images"
    _, tasks = retrain(task_count=6)
    assert tasks[0] == ("download", "Cached")


def test_a_night_without_a_class_of_the_champions_ends_before_its_training(workspace):
    def prepared(*names):
        (workspace.root / "data" / "prepared").mkdir(exist_ok=True)
        (workspace.root / "data" / "prepared" / "classes.json").write_text(json.dumps(names))
        (workspace.root / "source.txt").write_text(f"{names}")
        workspace.set(id="-".join(names), classes=list(names))
        return retrain(task_count=1)

    graph = workspace.root / "dvc.yaml"
    graph.write_text(graph.read_text().replace("download:", "prepare:"))
    assert prepared("a", "b")[0].result().champion == "a-b"
    state, tasks = prepared("a")
    assert tasks == [("prepare", "Completed")]
    with pytest.raises(NightlyError, match="the classes are not those of the model in service, a-b: b gone"):
        state.result()


def test_a_prediction_that_fails_keeps_nothing_from_being_published_and_the_promotion_is_told(workspace, monkeypatch):
    told = []
    monkeypatch.setattr("flows.notify.notify", lambda addresses, events, title, body: told.append(set(events)) or [])
    workspace.incoming("a.png")
    params = workspace.root / "params.yaml"
    params.write_text("retrain: {publish: commit}\n")
    (workspace.root / "tasks" / "predict.py").write_text("import sys\nsys.exit('error: 1 of 1 files failed')\n")
    git = ["git", "-C", str(workspace.root), "-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "start"], check=True)
    storage = [sys.executable, "-m", "dvc", "remote", "add", "--default", "storage", "../storage"]
    subprocess.run(storage, cwd=workspace.root, check=True, capture_output=True)
    state, _ = retrain(task_count=7)
    assert state.is_failed()
    with pytest.raises(StageFailed, match="1 of 1 files failed"):
        state.result()
    assert told == [{"failure", "promote"}]
    log = subprocess.run([*git, "log", "--format=%s"], check=True, capture_output=True, text=True).stdout
    assert log.startswith("nightly: promoted: the first model")
    page = (workspace.root / ".nightly" / "nights" / "latest.html").read_text()
    assert "before that, m1 was promoted" in page


def test_an_interrupted_training_is_no_failure_and_goes_on_with_the_next_run(workspace):
    from prefect.client.schemas.objects import StateType

    workspace.set(steps=5, interrupted_at=3)
    state, tasks = retrain(task_count=2)
    assert tasks == [("download", "Completed"), ("train", "Interrupted")]
    assert (state.type, state.name) == (StateType.CRASHED, "Interrupted")
    assert state.message == "train will go on from its checkpoint with the next run (stopped at step 3)"
    with pytest.raises(Interrupted, match="stopped at step 3"):
        state.result()
    assert registry.history(workspace.root / "models") == []

    state, tasks = retrain()
    assert state.result().champion == "m1"
    assert tasks[:2] == [("download", "Cached"), ("train", "Completed")]
    assert "from step 3" in (workspace.root / state.result().logs / "train.log").read_text()


def test_a_training_past_the_limit_of_time_goes_on_with_the_next_run(workspace):
    workspace.set(steps=1000)
    params = "retrain: {stage_time_limit_hours: 0.002, stop_grace_seconds: 20}"
    (workspace.root / "params.yaml").write_text(params)
    state, _ = retrain(task_count=2)
    assert state.name == "Interrupted"
    assert "train ran past its limit of 0.002 hours, was stopped and will go on from its chec" in state.message
    assert int((workspace.root / "checkpoint").read_text()) > 1


def test_the_download_is_tried_again(workspace):
    (workspace.root / "failures").write_text("2")
    state, tasks = retrain()
    assert state.is_completed()
    assert tasks[0] == ("download", "Completed")
    assert (workspace.root / "failures").read_text() == "0"


def test_a_wrong_parameter_is_found_before_any_stage_runs(workspace):
    (workspace.root / "params.yaml").write_text("retrain: {minimum_gian: 0.1}")
    state, tasks = retrain(task_count=0)
    assert tasks == []
    assert "unknown key 'retrain.minimum_gian', did you mean 'minimum_gain'?" in state.message


def test_a_second_retraining_is_skipped_and_says_who_is_at_work(workspace):
    with locked(Workspace(workspace.root), "nightly retrain"):
        state, tasks = retrain(task_count=0)
    assert (state.name, tasks) == ("Skipped", [])
    assert f"busy: 'nightly retrain' (process {os.getpid()} on" in state.message


def test_when_the_test_set_changes_the_champion_is_measured_on_the_new_one_if_it_can_be(workspace):
    retrain()
    workspace.set(id="m2", accuracy=0.99, test_digest="t2", champion_accuracy=None)
    state, _ = retrain()
    assert state.result().champion == "m1"
    assert "the champion was measured on another test set" in state.result().headline
    assert "nightly promote m2" in state.result().headline

    workspace.set(id="m3", accuracy=0.85, champion_accuracy=0.8)
    state, _ = retrain()
    judgement = state.result().judgement
    [reason] = judgement.verdict.reasons
    assert reason.startswith("better than the champion on the frozen test set by 5.00 points (95 % interval ")
    assert "; 5 images now right, 0 now wrong; p = 0.062)" in reason
    assert (judgement.champion["model_id"], judgement.champion["accuracy"]) == ("m1", 0.8)


def test_a_night_that_is_long_overdue_is_skipped(workspace):
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow
    from prefect.states import Scheduled

    from flows.retrain import retrain as flow

    due = datetime.now(UTC) - timedelta(hours=30)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(flow, state=Scheduled(scheduled_time=due))
    state = run_flow(flow, flow_run=run, parameters={}, return_type="state")
    assert state.name == "Skipped"
    assert state.message.startswith("this run was due 30 h 0 min ago")


def test_of_the_nights_that_were_missed_one_is_made_up_for(workspace):
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow
    from prefect.states import Scheduled

    from flows.retrain import retrain as flow
    from flows.serve import register

    now = datetime.now(UTC)
    _, deployment_id = register(ServeParams(cron="0 * * * *", timezone="UTC"))
    with get_client(sync_client=True) as client:
        span = {"start_time": f"{now - timedelta(hours=4)}", "end_time": f"{now}", "max_runs": 4}
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment_id}, json=span)
        past = [run for run in client.read_flow_runs() if run.deployment_id == deployment_id]
        missed = sorted((run for run in past if run.expected_start_time < now), key=lambda run: run.expected_start_time)
        asked_for = client.create_flow_run(flow, state=Scheduled(scheduled_time=missed[-1].expected_start_time))

    def run(flow_run):
        return run_flow(flow, flow_run=flow_run, parameters={}, return_type="state")

    try:
        workspace.set(steps=5, interrupted_at=3)
        assert run(missed[0]).name == "Interrupted"  # which makes up for nothing
        assert run(missed[1]).result().champion == "m1"
        state = run(missed[2])
        assert state.name == "Skipped"
        assert (
            f" has made up for this run, which was due {missed[2].expected_start_time:%Y-%m-%d %H:%M} UTC"
            in state.message
        )
        assert run(asked_for).message.startswith("nothing new: ")
    finally:
        with get_client(sync_client=True) as client:  # which other tests share
            client.delete_deployment(deployment_id)


def test_a_folder_is_classified_by_a_flow_of_its_own(workspace):
    from flows.predict import predict

    workspace.incoming("a.png")
    state = predict(return_state=True)
    assert state.is_failed()
    assert "no model yet: run 'nightly retrain'" in state.message
    retrain()
    assert predict().note == "1 of 1 files in data/incoming classified with openvino"
    with pytest.raises(NightlyError, match=r"there is nothing at '.*/nowhere': give a folder of images"):
        predict(source=Path("nowhere"))


def end_in_the_middle(workspace: Miniature, command: list[str], server: str, number: signal.Signals) -> tuple[int, str]:
    """Run a command, send it a signal while the training is at it; return its exit code and what it then said."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=workspace.root / "data",  # at the root, the miniature's own package would be found first
        env={**os.environ, "PREFECT_API_URL": server},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if "from step" in line:
                break
        time.sleep(0.3)  # within the printing of the line, the signal would make Python print it once more
        process.send_signal(number)
        said = process.stderr.read()
    return process.returncode, said


def test_stopping_the_flow_stops_the_training_saves_it_and_frees_the_workspace(workspace, server):
    workspace.set(steps=10_000)
    program = "from flows.retrain import retrain; retrain()"
    code, said = end_in_the_middle(workspace, ["-c", program], server, signal.SIGTERM)
    assert code == -signal.SIGTERM, said
    with locked(Workspace(workspace.root), "nightly retrain"):
        pass
    command_lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(b"work.py\x00train" in line for line in command_lines)
    assert int((workspace.root / "checkpoint").read_text()) > 0

    workspace.set(steps=0)
    state, tasks = retrain()
    assert tasks[1] == ("train", "Completed")
    assert "from step 0" not in (workspace.root / state.result().logs / "train.log").read_text()


def test_a_ctrl_c_in_a_terminal_says_that_the_training_is_saved(workspace, server):
    workspace.set(steps=10_000)
    code, said = end_in_the_middle(workspace, ["-m", "flows.cli", "retrain"], server, signal.SIGINT)
    assert code == 130, said
    step = (workspace.root / "checkpoint").read_text()
    *_, promise, last = said.splitlines()
    assert promise.endswith(f"  will go on from its checkpoint with the next run (stopped at step {step})"), said
    assert last == "error: interrupted"
    assert "Traceback" not in said


def test_a_night_that_does_not_reach_its_end_says_so_in_one_clear_line(workspace, server):
    def nightly_retrain() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli", "retrain"],
            cwd=workspace.root / "data",
            env={**os.environ, "PREFECT_API_URL": server},
            capture_output=True,
            text=True,
            check=False,
        )

    with locked(Workspace(workspace.root), "nightly retrain"):
        done = nightly_retrain()
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1].startswith("skipped: the workspace is busy: 'nightly retrain' (process ")
    assert done.stderr.count("busy") == 1

    workspace.set(steps=5, interrupted_at=3)
    done = nightly_retrain()
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == (
        "interrupted: train will go on from its checkpoint with the next run (stopped at step 3)"
    )
    assert done.stderr.count("stopped at") == 1
    assert "Traceback" not in done.stderr

    workspace.set(accuracy=None)
    done = nightly_retrain()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: train: train.learning_rate is too large: the loss is not")
    assert done.stderr.count("learning_rate") == 1
    assert "Traceback" not in done.stderr


# --- serve


def test_the_schedule_stands_on_the_server_and_stays_active(workspace):
    from prefect.client.orchestration import get_client

    from flows import serve

    params = ServeParams(cron="30 3 * * *", timezone="Europe/Madrid")
    runner, deployment_id = serve.register(params)
    serve.require_active(deployment_id, params)
    assert runner.pause_on_shutdown is False
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment(deployment_id)
        assert deployment.entrypoint == "flows.retrain.retrain"
        client.pause_deployment(deployment_id)
    with pytest.raises(NightlyError, match=r"the server did not take the schedule '30 3 .*: it is paused"):
        serve.require_active(deployment_id, params)
    _, again = serve.register(params)
    assert again == deployment_id
    serve.require_active(again, params)


def test_the_server_makes_runs_out_of_the_schedule(workspace):
    """Some versions of the server's libraries take a schedule and then never start anything."""
    from prefect.client.orchestration import get_client

    from flows import serve

    _, deployment_id = serve.register(ServeParams(cron="30 3 * * *", timezone="Europe/Madrid"))
    with get_client(sync_client=True) as client:
        client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment_id})
        runs = [run for run in client.read_flow_runs() if run.deployment_id == deployment_id]
    assert runs
    assert all(run.state_name == "Scheduled" for run in runs)


def test_the_hour_stays_the_same_when_the_clocks_change():
    from flows.settings import fire_times

    params = ServeParams(cron="0 2 * * *", timezone="Europe/Madrid")
    # The night of 29 March 2026 has no 2:00 in Madrid.
    times = fire_times(params, 4, datetime(2026, 3, 27, 12, tzinfo=ZoneInfo("Europe/Madrid")))
    assert [f"{time:%d %H}" for time in (times[0], times[2], times[3])] == ["28 02", "30 02", "31 02"]


def test_a_night_on_a_worker_as_the_documentation_sets_it_up(workspace, server, tmp_path_factory):
    from prefect.client.orchestration import get_client

    shutil.copy(PROJECT / "prefect.yaml", workspace.root)
    shutil.rmtree(
        workspace.root / "tasks"
    )  # a worker finds what lies in the workspace first, and no part of the real one
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "PREFECT_API_URL": server, "PREFECT_HOME": str(home), "COLUMNS": "200"}

    def prefect(*words, folder):
        command = [sys.executable, "-m", "prefect", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    prefect("work-pool", "create", "nightly", "--type", "process", folder=home)
    prefect("--no-prompt", "deploy", "--all", folder=workspace.root)
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("retrain/nightly")
        [step] = deployment.pull_steps
        assert list(step.values()) == [{"directory": str(workspace.root)}]
        run = client.create_flow_run_from_deployment(deployment.id)
        try:
            said = prefect("worker", "start", "--pool", "nightly", "--run-once", folder=home)
            assert client.read_flow_run(run.id).state_name == "Completed", said
        finally:
            client.delete_deployment(deployment.id)  # other tests share the server
    assert registry.history(workspace.root / "models")[-1].id == "m1"
    [page] = (workspace.root / ".nightly" / "nights").glob("2*.html")
    assert "none is known" in page.read_text()  # params.yaml has a schedule, which a worker does not follow


def test_nothing_travels_between_tasks_but_paths_and_no_result_is_kept():
    from prefect import Flow, Task
    from prefect.cache_policies import NO_CACHE

    import flows.predict
    import flows.retrain
    import flows.study

    modules = (flows.predict, flows.retrain, flows.study)
    found = {f"{module.__name__}.{name}": thing for module in modules for name, thing in vars(module).items()}
    tasks = {name: task for name, task in found.items() if isinstance(task, Task)}
    assert len(tasks) > 8
    assert {name for name, task in tasks.items() if task.cache_policy != NO_CACHE} == set()
    kept = {
        name for name, thing in found.items() if isinstance(thing, Task | Flow) and thing.persist_result is not False
    }
    assert kept == set()


def test_the_settings_that_must_stand_before_prefect_is_imported():
    program = """if True:
        import flows
        from prefect.settings import get_current_settings
        settings = get_current_settings()
        print(settings.server.analytics_enabled, settings.results.persist_by_default,
              settings.server.ephemeral.startup_timeout_seconds)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "180"]


def test_the_workers_deployment_has_the_default_schedule():
    project = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    [deployment] = project["deployments"]
    default = ServeParams()
    assert deployment["schedules"] == [{"cron": default.cron, "timezone": default.timezone}]
    module, _, name = deployment["entrypoint"].rpartition(".")
    assert getattr(importlib.import_module(module), name).name == "retrain"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cron": "at two"}, "must be five cron fields"),
        ({"timezone": "Europe/Madird"}, "must be an IANA time zone such as 'Europe/Madrid'"),
    ],
)
def test_a_wrong_schedule_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ServeParams(**values)
