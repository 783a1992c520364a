"""What a killed run left behind: found, put right, and nothing alive touched."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from flows import reconcile as reconciling
from flows import runs, stages
from flows.notify import events_of, nights, record_night
from flows.reconcile import (
    hopeless_predictions,
    is_lock_file,
    left_predictions,
    mended_dvc,
    mended_runs,
    reconcile,
    stale_notes,
    tidied,
)
from flows.runs import Run, process_mark, started_after
from flows.workspace import Workspace
from tasks.errors import NightlyError
from tasks.files import write_json
from tasks.inputs import Listing
from tasks.plan import unfinished, write_plan
from tests.miniature import Miniature

DVC_LOCK = "schema: '2.0'\nstages: {}\n"
POINTER = "outs:\n- md5: 2d8b540652193c4a653cb6a3f9325132.dir\n  path: m1\n"


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """The folders of a workspace, with DVC's as far as these tests need them."""
    for folder in (".nightly", ".dvc/tmp", "models/registry", "data/predictions", "data/additions"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".dvc" / "tmp" / "rwlock.lock").touch()
    return Workspace(tmp_path)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def own_run(**changes) -> Run:
    """Return this very process as a run."""
    pid = os.getpid()
    return replace(Run("id", "retrain", pid, process_mark(pid), *runs._here(), since=runs.now()), **changes)


# --- who is alive


def test_a_process_is_known_by_more_than_its_number(dead):
    assert own_run().fate() == "alive"
    assert own_run(pid=dead).fate() == "dead"
    assert own_run(mark="1").fate() == "dead", "the number is another's by now"
    assert own_run(boot="before the restart").fate() == "dead"
    assert own_run(host="another").fate() == "elsewhere"
    assert own_run(space="pid:[1]").fate() == "elsewhere"


def test_a_killed_process_is_dead_before_its_parent_has_looked_after_it():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process_mark(process.pid) is not None
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_mark(process.pid) is None


def test_when_a_process_started_is_known():
    now, started = time.time(), psutil.Process().create_time()
    assert started_after(os.getpid(), started - 65)
    assert not started_after(os.getpid(), started - 55)
    assert not started_after(os.getpid(), now)


# --- files


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(workspace, dead):
    models, me = workspace.models, os.getpid()
    for path in (
        f"models/registry/.m1.partial-{dead}/x",
        f"models/registry/.m2.partial-{me}/x",
        f"models/.exported.old-{dead}/x",
        f".nightly/.owner.json.partial-{dead}",
        f"data/predictions/.a.old-{dead}/x",
        "data/predictions/a/x",
        f"data/incoming/.mine.partial-{dead}/x",
        "data/.my-own-folder/x",
    ):
        (workspace.root / path).parent.mkdir(parents=True, exist_ok=True)
        (workspace.root / path).touch()
    assert list(tidied(workspace)) == [
        f"removed .nightly/.owner.json.partial-{dead}, which a killed run left behind",
        f"removed data/predictions/.a.old-{dead}, which a killed run left behind",
        "put back models/exported, which a killed run had moved aside",
        f"removed models/registry/.m1.partial-{dead}, which a killed run left behind",
    ]
    assert (models / "exported" / "x").is_file()
    assert (models / "registry" / f".m2.partial-{me}" / "x").is_file()
    assert (workspace.root / "data" / "incoming" / f".mine.partial-{dead}" / "x").is_file(), "the user's"
    assert (workspace.root / "data" / ".my-own-folder" / "x").is_file()
    assert list(tidied(workspace)) == []


def test_predictions_that_nobody_will_finish_are_named_and_left(workspace):
    predictions, source = workspace.predictions, workspace.root / "album"
    source.mkdir()
    write_json(workspace.models / "champion.json", {"id": "m2"})

    def leave(name: str, folder: Path, model: str) -> None:
        listing = Listing(["a.png"], np.zeros(1, np.int64), np.zeros(1, np.int64), 0, 0, 0)
        write_plan(unfinished(str(predictions / name)), {"source": str(folder), "model": model}, listing, 10)

    leave("1", source, "m2")
    leave("2", source, "m1")
    leave("3", workspace.root / "gone", "m2")
    (predictions / ".4.unfinished").mkdir()
    assert list(hopeless_predictions(workspace)) == [
        "data/predictions/.2.unfinished was never finished and will not be: its model m1 is not in service any more",
        "data/predictions/.3.unfinished was never finished and will not be: "
        f"its images in {workspace.root / 'gone'} are gone",
        "data/predictions/.4.unfinished was never finished and will not be: it has no plan to go on with",
    ]
    assert len(list(predictions.iterdir())) == 4


def test_predictions_of_killed_nights_go_when_later_ones_made_them_anew(workspace):
    write_json(workspace.models / "champion.json", {"id": "m2"})
    for run in ("20260101-020000", "20260102-020000", "20260104-020000"):
        record_night(workspace, run, "killed", runs.datetime.now().astimezone(), "killed")
    for name in ("20260101-020000", "20260102-020000", "20260102-120000", "20260104-020000"):
        (workspace.predictions / f".{name}.unfinished").mkdir(parents=True)
    (workspace.predictions / "20260103-020000").mkdir()
    said = list(left_predictions(workspace))
    assert [line for line in said if line.startswith("removed")] == [
        "removed data/predictions/.20260101-020000.unfinished, which a killed run left behind",
        "removed data/predictions/.20260102-020000.unfinished, which a killed run left behind",
    ]
    left = {path.name for path in workspace.predictions.glob(".*")}
    assert left == {".20260102-120000.unfinished", ".20260104-020000.unfinished"}  # a person's, and the latest


# --- DVC


def notes(workspace: Workspace, *pids: int, written: float | None = None) -> Path:
    """Write DVC's file of who is at work."""
    path = workspace.root / ".dvc" / "tmp" / "rwlock"
    readers = [{"pid": pid, "cmd": "dvc repro"} for pid in pids[1:]]
    path.write_text(json.dumps({"write": {"a": {"pid": pids[0], "cmd": "dvc repro"}}, "read": {"b": readers}}))
    if written is not None:
        os.utime(path, (written, written))
    return path


def test_a_note_of_a_process_whose_number_is_anothers_by_now_blocks_dvc_no_more(workspace, dead):
    path = notes(workspace, os.getpid(), dead, written=time.time() - 7 * 86400)
    assert stale_notes(workspace.root) == f"process {os.getpid()} is another one than it was"
    assert len(list(mended_dvc(workspace))) == 1
    assert not path.exists()


def test_a_note_of_a_living_process_stays(workspace, dead):
    path = notes(workspace, os.getpid())
    assert list(mended_dvc(workspace)) == []
    notes(workspace, dead)
    assert list(mended_dvc(workspace)) == [], "DVC sees to these itself"
    program = "import sys; input()"
    with subprocess.Popen([sys.executable, "-c", program, "dvc"], stdin=subprocess.PIPE) as process:
        notes(workspace, os.getpid(), process.pid, written=time.time() - 7 * 86400)
        assert list(mended_dvc(workspace)) == [], "one of the two may be DVC"
        process.communicate(b"\n")
    assert path.exists()


@pytest.mark.parametrize("content", ["", '{"wri', "[]", '{"write": {"a": {}}}'])
def test_torn_notes_are_removed_unless_dvc_is_just_writing_them(workspace, content):
    path = workspace.root / ".dvc" / "tmp" / "rwlock"
    path.write_text(content)
    with (workspace.root / ".dvc" / "tmp" / "rwlock.lock").open("rb+") as busy:
        reconciling.fcntl.flock(busy, reconciling.fcntl.LOCK_EX)
        assert list(mended_dvc(workspace)) == []
    assert list(mended_dvc(workspace)) == ["removed DVC's notes on who is at work: they are torn"]
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "schema: '2.0'\nstages:\n  s:\n    cmd: \"ec", "sche"])
def test_a_torn_dvc_lock_is_set_aside(workspace, content):
    lock = workspace.root / "dvc.lock"
    lock.write_text(DVC_LOCK)
    assert list(mended_dvc(workspace)) == []
    lock.write_text(content)
    assert len(list(mended_dvc(workspace))) == 1
    assert not lock.exists()
    assert (workspace.state / "dvc.lock.torn").read_text() == content


def test_a_dvc_lock_is_taken_for_torn_wherever_dvc_would_refuse_it(tmp_path):
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA

    whole = textwrap.dedent("""\
        schema: '2.0'
        stages:
          train:
            cmd: python -m tasks.train --out models/candidate
              --scratch .nightly
            deps:
            - path: data/raw
              hash: md5
              md5: 401b30e3b8b5d629635a5c613cdb7919.dir
              size: 2
              nfiles: 1
            params:
              params.yaml:
                train:
                  epochs: 12
                  seed: null
            outs:
            - path: models/candidate
              hash: md5
              md5: 401b30e3b8b5d629635a5c613cdb7919
              size: 2
    """)
    lock = tmp_path / "dvc.lock"
    refused = 0
    for length in range(len(whole) + 1):
        lock.write_text(whole[:length])
        if is_lock_file(lock):
            COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(whole[:length]))
        else:
            refused += 1
    assert is_lock_file(lock)
    assert refused < len(whole), "some cuts at the end of a line are all right"


@pytest.mark.parametrize(
    "content", ["", "outs:\n- md5: 2d", POINTER.removesuffix("1\n"), POINTER.replace("  path: m1\n", "")]
)
def test_a_torn_pointer_is_written_anew_if_there_is_what_it_points_to(workspace, content, monkeypatch):
    tracked = []
    monkeypatch.setattr(stages, "track", lambda root, path: tracked.append(path))
    model, pointer = workspace.registry / "m1", workspace.registry / "m1.dvc"
    pointer.write_text(POINTER)
    assert list(mended_dvc(workspace)) == []
    pointer.write_text(content)
    [line] = mended_dvc(workspace)
    assert "git has the last good one" in line
    assert pointer.exists()
    model.mkdir()
    assert list(mended_dvc(workspace)) == ["wrote a torn models/registry/m1.dvc anew"]
    assert tracked == [model]
    assert not pointer.exists(), "DVC writes it, and refuses to on top of a torn one"


@pytest.mark.slow
def test_dvc_works_again_with_all_of_its_files_torn(tmp_path):
    Miniature(tmp_path)
    workspace = Workspace(tmp_path)
    workspace.state.mkdir()
    log = workspace.state / "log"
    for stage in ("download", "train"):
        stages.reproduce(tmp_path, stage, log=log, emit=print)
    model = workspace.registry / "m1"
    model.mkdir(parents=True)
    (model / "weights").write_text("w")
    stages.track(tmp_path, model)
    whole = (tmp_path / "dvc.lock").read_text(), (workspace.registry / "m1.dvc").read_text()

    (tmp_path / "dvc.lock").write_text(whole[0][:-30])
    (workspace.registry / "m1.dvc").write_text(whole[1][:-20])
    (tmp_path / ".dvc" / "tmp" / "rwlock").write_text('{"wri')
    with pytest.raises(NightlyError):
        stages.reproduce(tmp_path, "train", log=log, emit=print)
    lines = reconcile(workspace, print)
    assert len(lines) == 3
    assert (workspace.registry / "m1.dvc").read_text() == whole[1]
    outcomes = [stages.reproduce(tmp_path, stage, log=log, emit=print) for stage in ("download", "train")]
    assert outcomes == [stages.Outcome.restored] * 2
    assert (tmp_path / "dvc.lock").read_text() == whole[0]


# --- all of it


def test_what_was_done_is_told_and_what_fails_stops_nobody(workspace, dead, monkeypatch):
    def no_permission(workspace):
        raise PermissionError(13, "Permission denied", "somewhere")
        yield

    (workspace.models / f".exported.partial-{dead}").mkdir()
    (workspace.predictions / ".4.unfinished").mkdir()
    monkeypatch.setattr(reconciling, "mended_dvc", no_permission)
    told: list[str] = []
    lines = reconcile(workspace, told.append)
    assert (
        lines
        == told
        == [
            f"removed models/.exported.partial-{dead}, which a killed run left behind",
            "could not be put right: no permission (somewhere)",
            "data/predictions/.4.unfinished was never finished and will not be: it has no plan to go on with",
        ]
    )


def test_nothing_to_do_takes_no_server_and_no_time(workspace):
    program = (
        "import sys, pathlib; from flows.reconcile import reconcile; from flows.workspace import Workspace\n"
        f"assert reconcile(Workspace(pathlib.Path({str(workspace.root)!r})), print) == []\n"
        "print(*{'prefect', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# --- runs on a server


def on_server(state_name: str = "Running", with_task: bool = True):
    """Make a run of a flow ``retrain`` on the server, in a state and with one task run in the same state."""
    from prefect import flow, task
    from prefect.client.orchestration import get_client
    from prefect.states import State

    @flow(name="retrain")
    def some_flow() -> None:
        pass

    @task(name="train")
    def some_task() -> None:
        pass

    state = State(type=state_name.upper(), name=state_name)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(some_flow)
        client.set_flow_run_state(run.id, state, force=True)
        if with_task:
            task_run = client.create_task_run(some_task, flow_run_id=run.id, dynamic_key="0")
            client.set_task_run_state(task_run.id, state, force=True)
    return run


def states(run) -> tuple[str, list[str]]:
    """Return the states of a run and of its task runs on the server."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
        return client.read_flow_run(run.id).state_name, [task.state_name for task in tasks]


def note(workspace: Workspace, run, **changes) -> Path:
    """Write down which process a run is."""
    file = runs.runs_folder(workspace) / f"{run.id}.json"
    write_json(file, asdict(own_run(id=str(run.id), **changes)))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("state", ["Running", "Pending", "Cancelling"])
def test_a_run_of_a_dead_process_is_set_to_crashed_with_its_tasks(workspace, server, dead, state):
    run = on_server(state)
    file = note(workspace, run, pid=dead)
    reason = f"process {dead} on {socket.gethostname()} was killed"
    assert list(mended_runs(workspace)) == [f"run '{run.name}' was {state} and is now Crashed: {reason}"]
    assert states(run) == ("Crashed", ["Crashed"])
    assert not file.exists()
    assert list(mended_runs(workspace)) == []


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_was_canceled_leaves_no_task_at_work(workspace, server, dead):
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    run = on_server()
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Cancelled(), force=True)
    file = note(workspace, run, pid=dead, ended=runs.now())
    assert list(mended_runs(workspace)) == [], "its tasks may be about to tell the server"
    note(workspace, run, pid=dead)
    assert [line.partition(", ")[0] for line in mended_runs(workspace)] == [f"run '{run.name}' is Cancelled"]
    assert states(run) == ("Cancelled", ["Crashed"])
    assert not file.exists()


@pytest.mark.slow
def test_a_run_of_a_living_process_stays_and_one_that_is_over_is_forgotten(workspace, server, dead):
    running, done = on_server(), on_server("Completed")
    files = [note(workspace, running), note(workspace, done, pid=dead)]
    assert list(mended_runs(workspace)) == []
    assert states(running) == ("Running", ["Running"])
    assert states(done) == ("Completed", ["Completed"])
    assert [file.exists() for file in files] == [True, False]
    note(workspace, running, ended=runs.now())
    assert list(mended_runs(workspace)) == [], "it may be about to tell the server"


@pytest.mark.slow
def test_a_run_of_another_machine_is_judged_by_the_lock_and_by_its_own_word(workspace, server):
    before = (runs.datetime.now().astimezone() - 2 * reconciling.REPORTING_TIME).isoformat()
    noted = {
        "killed": {"since": before},
        "just started": {},
        "just ended": {"since": before, "ended": runs.now()},
        "ended long ago": {"since": before, "ended": before},
    }
    found = {name: on_server(with_task=False) for name in noted}
    for name, run in found.items():
        note(workspace, run, host="other", **noted[name])
    at_work = on_server(with_task=False)
    note(workspace, at_work, host="other", since=before, alone=False)  # a prediction, which holds nothing
    assert len(list(mended_runs(workspace))) == 2
    assert states(at_work)[0] == "Running"
    assert {name: states(run)[0] for name, run in found.items()} == {
        "killed": "Crashed",
        "just started": "Running",
        "just ended": "Running",
        "ended long ago": "Crashed",
    }


@pytest.mark.slow
def test_a_server_that_does_not_answer_stops_nobody_and_the_note_stays(workspace, server, dead):
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    run = on_server(with_task=False)
    file = note(workspace, run, pid=dead)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        [line] = reconcile(workspace, print)
    assert line.startswith("runs of dead processes were not looked for: ")
    assert file.exists()


#: A night of its own process that works until it is killed, or ends as told.
NIGHT = """
    import sys, time, pathlib, prefect
    from flows.runs import recorded
    from flows.workspace import Workspace

    @prefect.task
    def train():
        print("training", flush=True)
        time.sleep(60)

    @prefect.flow(name="retrain")
    def retrain():
        with recorded(Workspace(pathlib.Path(sys.argv[1])), "20260101-020000"):
            if sys.argv[2] == "fail":
                raise ValueError("no images")
            train()

    retrain()
"""


@contextmanager
def night(workspace: Workspace, server: str, what: str):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(NIGHT), str(workspace.root), what],
        env={**os.environ, "PREFECT_API_URL": server},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        yield process


@pytest.mark.slow
def test_a_night_killed_in_the_middle_is_found_by_the_next(workspace, server):
    from prefect.client.orchestration import get_client

    with night(workspace, server, "train") as process:
        assert process.stdout.readline() == b"training\n"
        [(file, noted)] = runs.recorded_runs(workspace).items()
        assert noted.fate() == "alive"
        assert noted.pid == process.pid
        assert list(mended_runs(workspace)) == []
        process.kill()
    assert noted.fate() == "dead"
    [line] = reconcile(workspace, print)
    assert line.startswith(f"run '{noted.name}' was Running and is now Crashed: process {process.pid} on ")
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(noted.id).state_name == "Crashed"
    assert not file.exists()
    [record] = nights(workspace)
    assert (record.run, record.state) == ("20260101-020000", "killed")
    assert record.headline.startswith(f"killed: process {process.pid} on ")
    assert events_of("promoted", [record]) == ["promote", "recovery"]


@pytest.mark.slow
def test_a_night_that_fails_in_order_is_noted_as_ended_and_forgotten(workspace, server):
    with night(workspace, server, "fail"):
        pass
    [noted] = runs.recorded_runs(workspace).values()
    assert noted.ended is not None
    assert reconcile(workspace, print) == []
    assert runs.recorded_runs(workspace) == {}
    assert nights(workspace) == []  # it has told how it ended itself


# --- the temporary server

ALONE = """
    import sys, time, pathlib, flows
    from flows.temporary import start_temporary_server
    from prefect.client.orchestration import get_client
    url = start_temporary_server(pathlib.Path(sys.argv[1]))
    with get_client(sync_client=True) as client:
        assert str(client.api_url).rstrip("/") == url
    print(url, flush=True)
    sys.stdin.read()
"""


def servers_on(url: str) -> list[psutil.Process]:
    port = url.rpartition(":")[2].partition("/")[0]
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if port in (one.info["cmdline"] or []) and "uvicorn" in one.info["cmdline"]]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["in order", "killed"])
def test_a_temporary_server_ends_with_the_command_that_started_it(tmp_path, ending):
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ALONE), str(tmp_path / "logs" / "server.log")],
        env={**environment, "PREFECT_HOME": str(tmp_path / "home")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        url = process.stdout.readline().strip()
        started = servers_on(url)
        assert len(started) == 2, "the server and its guard"
        if ending == "killed":
            process.kill()
        else:
            process.stdin.close()
    gone, alive = psutil.wait_procs(started, timeout=0.1 if ending == "in order" else 15)
    assert alive == [], gone
    assert process.returncode == (0 if ending == "in order" else -signal.SIGKILL)


def test_a_temporary_server_that_does_not_start_says_so(tmp_path, monkeypatch):
    from flows import temporary

    monkeypatch.setattr(temporary.sys, "executable", "/bin/false")
    with pytest.raises(NightlyError, match=r"^the temporary Prefect server ended with exit code 1: see "):
        temporary.start_temporary_server(tmp_path / "server.log")
