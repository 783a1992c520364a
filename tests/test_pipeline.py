"""The workspace's lock, the supervision of children, and the adapter to DVC."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from flows import child, stages, storage
from flows.child import StageFailed
from flows.stages import Outcome
from flows.workspace import Busy, Workspace, find_workspace, locked
from tasks.errors import NightlyError


def alive(pid: int) -> bool:
    """Say whether a process runs; a zombie that nobody has reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def script(tmp_path):
    """Return a function that makes a Python command from source text."""

    def make(source: str) -> list[str]:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(source))
        return [sys.executable, str(file)]

    return make


def run(command, tmp_path, **options) -> list[str]:
    lines: list[str] = []
    options = {"name": "work", "root": tmp_path, "log": tmp_path / "logs" / "work.log", "emit": lines.append} | options
    child.run(command, **options)
    return lines


# --- the workspace


def test_the_workspace_is_the_nearest_folder_with_a_dvc_yaml(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert find_workspace(below).root == tmp_path.resolve()


def test_outside_of_a_workspace_the_error_says_where_to_go(tmp_path):
    with pytest.raises(NightlyError, match=r"is in no workspace: go to the folder that holds dvc\.yaml"):
        find_workspace(tmp_path)


def test_a_folder_without_dvc_is_told_how_to_get_it(tmp_path):
    (tmp_path / "dvc.yaml").touch()
    with pytest.raises(NightlyError, match="run 'git init && dvc init' there"):
        find_workspace(tmp_path)


HOLDER = """
    import sys, time
    from pathlib import Path
    from flows.workspace import Workspace, locked
    with locked(Workspace(Path(sys.argv[1])), "nightly retrain"):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_holder_is_told_who_holds_the_lock_and_death_frees_it(tmp_path, script):
    workspace = Workspace(tmp_path)
    with subprocess.Popen([*script(HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(Busy, match=rf"busy: 'nightly retrain' \(process {holder.pid} on .+\) since 20"),
            locked(workspace, "nightly predict"),
        ):
            pass
        holder.kill()
    with locked(workspace, "nightly configure"):
        assert json.loads((tmp_path / ".nightly" / "owner.json").read_text())["command"] == "nightly configure"
    assert not (tmp_path / ".nightly" / "owner.json").exists()


def test_an_error_inside_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(Workspace(tmp_path), "nightly retrain"):
        1 / 0  # noqa: B018
    with locked(Workspace(tmp_path), "nightly retrain"):
        pass


# --- children


def test_lines_of_both_streams_arrive_in_order_and_plain(tmp_path, script):
    command = script(
        r"""
        import sys
        print("one")
        print("\x1b[31mred\x1b[0m café", file=sys.stderr)
        sys.stdout.buffer.write(b"10%\r20%\r\nbad \xff byte\nno newline at the end")
        """
    )
    expected = ["one", "red café", "10%", "20%", "bad � byte", "no newline at the end"]
    assert run(command, tmp_path) == expected
    assert (tmp_path / "logs" / "work.log").read_text().splitlines() == expected


def test_lines_arrive_while_the_child_works(tmp_path, script):
    command = script("import time\nprint('early')\ntime.sleep(1.0)\nprint('late')")
    times = []
    child.run(command, name="work", root=tmp_path, log=tmp_path / "log", emit=lambda _: times.append(time.monotonic()))
    assert times[1] - times[0] > 0.8


def test_the_message_of_a_failure_is_the_childs_own(tmp_path, script):
    command = script(
        "import sys\nprint('error: no images in data/raw: put some there')\nprint('ERROR: x')\nsys.exit(1)"
    )
    with pytest.raises(StageFailed, match=r"^work: no images in data/raw: put some there \(log: logs/work\.log\)$"):
        run(command, tmp_path)


def test_a_crash_is_explained_by_its_last_line(tmp_path, script):
    with pytest.raises(StageFailed, match=r"ended with exit code 1; its last line was: KeyError: 'a'"):
        run(script("{}['a']"), tmp_path)


def test_a_command_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(StageFailed, match="work: no-such-program: No such file or directory"):
        run(["no-such-program"], tmp_path)


FAMILY = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the grandchild as well
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(os.getpid(), grandchild.pid, flush=True)
    time.sleep(60)
"""


def test_past_the_limit_the_whole_family_ends_even_if_it_ignores_sigint(tmp_path, script):
    pids: list[int] = []
    start = time.monotonic()
    with pytest.raises(StageFailed, match=r"work: ran past its limit of 0\.000278 hours and was ended"):
        run(
            script(FAMILY),
            tmp_path,
            emit=lambda line: pids.extend(map(int, line.split())),
            limit_seconds=1.0,
            grace_seconds=0.3,
        )
    assert time.monotonic() - start < 5
    assert len(pids) == 2
    assert not any(map(alive, pids))


def test_past_the_limit_a_child_may_still_say_its_last_words(tmp_path, script):
    command = script(
        """
        import signal, sys, time
        def stop(*_):
            print("checkpoint written")
            sys.exit(0)
        signal.signal(signal.SIGINT, stop)
        print("ready")
        time.sleep(60)
        """
    )
    lines: list[str] = []
    with pytest.raises(StageFailed, match="ran past its limit"):
        run(command, tmp_path, emit=lines.append, limit_seconds=1.0)
    assert lines == ["ready", "checkpoint written"]


def test_what_a_child_leaves_running_is_ended_with_it(tmp_path, script):
    command = script(
        """
        import subprocess, sys
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(left.pid)
        """
    )
    start = time.monotonic()
    [pid] = run(command, tmp_path)
    assert time.monotonic() - start < 5
    wait_until(lambda: not alive(int(pid)))


PARENT = """
    import sys
    from pathlib import Path
    from flows import child
    root = Path(sys.argv[1])
    child.run([sys.executable, str(root / "family.py")], name="work", root=root, log=root / "log",
              emit=lambda line: print(line, flush=True), grace_seconds=0.3)
"""


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGTERM", "SIGINT", "Ctrl-C"])
def test_a_family_dies_with_its_flow_however_that_ends(tmp_path, script, ending):
    (tmp_path / "family.py").write_text(textwrap.dedent(FAMILY))
    with subprocess.Popen(
        [*script(PARENT), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        if ending == "Ctrl-C":  # a terminal signals the whole foreground group
            os.killpg(parent.pid, signal.SIGINT)
        else:
            os.kill(parent.pid, signal.Signals[ending])
    wait_until(lambda: not any(map(alive, pids)))


# --- DVC


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A workspace without git: numbers.txt -> double -> total."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    (tmp_path / "double.py").write_text(
        textwrap.dedent(
            """
            import pathlib
            print("doubling")
            numbers = pathlib.Path("numbers.txt").read_text().split()
            pathlib.Path("doubled.txt").write_text(" ".join(str(2 * int(number)) for number in numbers))
            """
        )
    )
    (tmp_path / "total.py").write_text(
        textwrap.dedent(
            """
            import pathlib, sys
            total = sum(map(int, pathlib.Path("doubled.txt").read_text().split()))
            if total > 100:
                sys.exit(f"error: the total must be at most 100, but is {total}")
            pathlib.Path("total.txt").write_text(str(total))
            """
        )
    )
    (tmp_path / "dvc.yaml").write_text(
        textwrap.dedent(
            """
            stages:
              double:
                cmd: python double.py
                deps: [numbers.txt, double.py]
                outs: [doubled.txt]
              total:
                cmd: python total.py
                deps: [doubled.txt, total.py]
                outs: [total.txt]
            """
        )
    )
    (tmp_path / "numbers.txt").write_text("1 2 3")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def reproduce(root: Path, stage: str, **options) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    outcome = stages.reproduce(root, stage, log=root / "logs" / f"{stage}.log", emit=lines.append, **options)
    return outcome, lines


@pytest.mark.slow
def test_stages_run_once_and_come_back_from_the_cache(pipeline):
    assert stages.stage_names(pipeline) == ["double", "total"]
    assert stages.stale_stages(pipeline, ["double", "total"]) == {"double", "total"}
    assert reproduce(pipeline, "double") == (Outcome.ran, ["doubling"])
    assert reproduce(pipeline, "total") == (Outcome.ran, [])
    assert (pipeline / "total.txt").read_text() == "12"
    assert stages.stale_stages(pipeline, ["double", "total"]) == set()
    assert reproduce(pipeline, "double") == (Outcome.unchanged, [])
    assert reproduce(pipeline, "double", force=True) == (Outcome.ran, ["doubling"])

    (pipeline / "numbers.txt").write_text("1 2 4")
    assert stages.stale_stages(pipeline, ["double", "total"]) == {"double"}
    assert reproduce(pipeline, "double") == (Outcome.ran, ["doubling"])
    assert stages.stale_stages(pipeline, ["double", "total"]) == {"total"}

    (pipeline / "numbers.txt").write_text("1 2 3")
    assert reproduce(pipeline, "double") == (Outcome.restored, [])
    assert "> python double.py" in (pipeline / "logs" / "double.log").read_text()


@pytest.mark.slow
def test_a_failing_stage_says_its_own_error(pipeline):
    (pipeline / "numbers.txt").write_text("50 1")
    reproduce(pipeline, "double")
    with pytest.raises(StageFailed, match=r"^total: the total must be at most 100, but is 102 \(log: logs/total\.log"):
        reproduce(pipeline, "total")


LOCK_HOLDER = """
    import sys, time, zc.lockfile
    lock = zc.lockfile.LockFile(sys.argv[1])
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("patience_seconds", [0.0, 60.0])
def test_another_dvc_command_is_waited_for(pipeline, script, patience_seconds):
    hold = [*script(LOCK_HOLDER), str(pipeline / ".dvc" / "tmp" / "lock"), "5"]  # DVC itself gives up after 3.5 s
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        if patience_seconds:
            outcome, lines = reproduce(pipeline, "double", patience_seconds=patience_seconds)
            assert outcome is Outcome.ran
            assert lines[0].startswith("waiting for another DVC command to end (Unable to acquire lock")
        else:
            with pytest.raises(NightlyError, match="another DVC command is at work here"):
                reproduce(pipeline, "double")
        holder.kill()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["track", "fetch"])
def test_another_dvc_command_is_waited_for_by_those_that_track_and_fetch(pipeline, script, what):
    said, file = [], pipeline / "weights"
    file.write_text("1 2 3")
    if what == "fetch":
        stages.track(pipeline, file)
        file.unlink()
    hold = [*script(LOCK_HOLDER), str(pipeline / ".dvc" / "tmp" / "lock"), "5"]
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        if what == "track":
            stages.track(pipeline, file, 60, said.append)
        else:
            storage.fetch(pipeline, file, log=pipeline / "log", emit=said.append, patience_seconds=60)
        holder.kill()
    assert file.read_text() == "1 2 3"
    assert (pipeline / "weights.dvc").is_file()
    assert said[0].startswith("waiting for another DVC command to end (")
    assert "Unable to acquire lock" in said[0]


@pytest.mark.slow
def test_what_is_in_no_storage_is_named(pipeline):
    (pipeline / "gone.dvc").write_text("outs:\n- md5: d8e8fca2dc0f896fd7cb4cb0031ba249\n  size: 5\n  path: gone\n")
    with pytest.raises(StageFailed, match=r"^gone is neither in DVC.s cache nor in a remote .*remove gone.dvc"):
        storage.fetch(pipeline, pipeline / "gone", log=pipeline / "log", emit=print)


@pytest.mark.slow
def test_a_tracked_directory_comes_back_after_it_was_pruned(pipeline):
    model = pipeline / "models" / "registry" / "abc"
    model.mkdir(parents=True)
    (model / "weights").write_text("1 2 3")
    stages.track(pipeline, model)
    (model / "weights").unlink()
    model.rmdir()
    storage.fetch(pipeline, model, log=pipeline / "fetch.log", emit=print)
    assert (model / "weights").read_text() == "1 2 3"


def test_a_broken_graph_is_one_line(pipeline):
    (pipeline / "dvc.yaml").write_text("stages: [")
    with pytest.raises(NightlyError, match=r"^dvc stage: .*dvc\.yaml") as caught:
        stages.stage_names(pipeline)
    assert "\n" not in str(caught.value)


def test_a_workspace_without_git_is_told_what_to_do(pipeline):
    (pipeline / ".dvc" / "config").write_text("")  # no "no_scm" any more
    with pytest.raises(NightlyError, match="is not a git repository: run 'git init' there, or work in a clone"):
        stages.stage_names(pipeline)
