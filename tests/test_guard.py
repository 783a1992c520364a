"""How a supervised command is stopped: it may save its work first, and then nothing of it is left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows import child
from flows.child import GUARD, StageFailed
from tasks.errors import EXIT_INTERRUPTED, Interrupted

#: Saves for a while after a signal, saying so at length, and ends as a stage does.
WORKER = """
    import os, signal, sys, time

    def stop(number, _):
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(signal.Signals[name], signal.SIG_IGN)
        print(f"saving after {signal.Signals(number).name}", "x" * 200_000, flush=True)
        time.sleep(float(sys.argv[1]))
        open("checkpoint", "w").write(signal.Signals(number).name)
        print("interrupted: stopped in epoch 3", file=sys.stderr, flush=True)
        os._exit(75)

    for name in ("SIGINT", "SIGTERM"):
        signal.signal(signal.Signals[name], stop)
    print("working", os.getpid(), flush=True)
    time.sleep(60)
"""

#: What DVC is on a SIGTERM: a parent that dies at once.
PARENT = """
    import signal, subprocess, sys
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(signal.Signals[name], signal.SIG_DFL)
    worker = subprocess.Popen([sys.executable, "worker.py", sys.argv[1]])
    worker.wait()
"""

#: A program that handles no signal itself: Python's own KeyboardInterrupt, unless SIGINT is ignored from the start.
PLAIN = """
    import os, time
    print("working", os.getpid(), flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        open("checkpoint", "w").write("plain")
"""

#: What a shell does to "command &" in a script.
IGNORING = 'trap "" INT; exec "$@"'


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    (tmp_path / "plain.py").write_text(textwrap.dedent(PLAIN))
    return tmp_path


def worker(seconds: float) -> list[str]:
    return [sys.executable, "worker.py", str(seconds)]


def parent(seconds: float) -> list[str]:
    return [sys.executable, "parent.py", str(seconds)]


@contextmanager
def guarded(
    folder: Path, command: list[str], grace_seconds: float = 30.0, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a command under guard; yield the guard and the process number of the worker, which is at work."""
    with subprocess.Popen(
        [*prefix, sys.executable, "-I", "-S", str(GUARD), str(grace_seconds), *command],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as guard:
        yield guard, int(guard.stdout.readline().split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def checkpoint(folder: Path) -> str:
    return (folder / "checkpoint").read_text() if (folder / "checkpoint").exists() else ""


def run(folder: Path, command: list[str], **options) -> list[str]:
    lines: list[str] = []
    options = {"name": "train", "root": folder, "log": folder / "train.log", "emit": lines.append} | options
    child.run(command, **options)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["the lifeline closes", "the parent is killed", "everything gets SIGTERM"])
def test_a_worker_saves_although_its_parent_dies_at_once(folder, ending):
    with guarded(folder, parent(1)) as (guard, pid):
        if ending == "the parent is killed":
            os.kill(os.getpgid(pid), signal.SIGKILL)
        elif ending == "everything gets SIGTERM":  # as from a service manager
            os.killpg(os.getpgid(pid), signal.SIGTERM)
            os.kill(guard.pid, signal.SIGTERM)
        else:
            guard.stdin.close()
        assert guard.stdout.read().endswith(b"interrupted: stopped in epoch 3\n")
    assert checkpoint(folder)
    assert not alive(pid)


def test_a_worker_saves_although_nobody_reads_its_output_any_more(folder):
    with guarded(folder, worker(0.5)) as (guard, pid):
        guard.stdout.close()
    assert guard.returncode == EXIT_INTERRUPTED
    assert checkpoint(folder) == "SIGINT"
    assert not alive(pid)


def test_a_worker_started_from_a_scripts_background_hears_of_its_end(folder):
    with guarded(folder, [sys.executable, "plain.py"], prefix=("sh", "-c", IGNORING, "sh")) as (guard, _):
        guard.communicate()
    assert checkpoint(folder) == "plain"


def test_the_grace_ends(folder):
    with guarded(folder, parent(60), grace_seconds=0.5) as (guard, pid):
        start = time.monotonic()
        guard.communicate()
        assert time.monotonic() - start < 5
    assert checkpoint(folder) == ""
    assert not alive(pid)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        ("Interrupted('at step 7')", "interrupted: at step 7\n", EXIT_INTERRUPTED),
        ("NightlyError('no images')", "error: no images\n", 1),
        ("KeyboardInterrupt", "error: stopped by Ctrl-C\n", 130),
    ],
)
def test_a_stage_ends_with_one_line_and_the_exit_code_that_goes_with_it(error, line, code):
    program = f"from tasks.errors import *\ndef main(): raise {error}\nrun_main(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == (line, code)


def test_an_interrupted_stage_is_no_failure(folder):
    command = [sys.executable, "-c", "import sys; print('interrupted: at step 7 of 9'); sys.exit(75)"]
    with pytest.raises(
        Interrupted, match=r"^train will go on from its checkpoint with the next run \(at step 7 of 9\)$"
    ):
        run(folder, command)


def test_the_exit_code_counts_without_any_words(folder):
    with pytest.raises(Interrupted, match=r"^train will go on from its checkpoint with the next run$"):
        run(folder, [sys.executable, "-c", "import sys; sys.exit(75)"])


def test_dvc_hands_the_exit_code_on_in_words(folder):
    line = "ERROR: failed to reproduce 'train': failed to run: python work.py, exited with {}"
    program = "import sys; print(sys.argv[1]); sys.exit(255)"
    with pytest.raises(Interrupted, match="will go on"):
        run(folder, [sys.executable, "-c", program, line.format(75)])
    with pytest.raises(StageFailed, match="exited with 175"):
        run(folder, [sys.executable, "-c", program, line.format(175)])


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["sh", "bash"])  # the former ends by the signal itself, and hides the exit code
def test_past_the_limit_a_stage_behind_a_shell_saves_for_two_seconds_and_goes_on_the_next_time(folder, shell):
    message = (
        r"^train ran past its limit of 0\.000278 hours, was stopped and will go on from its checkpoint "
        r"with the next run \(stopped in epoch 3\)$"
    )
    start = time.monotonic()
    with pytest.raises(Interrupted, match=message):
        run(folder, [shell, "-c", f"{sys.executable} worker.py 2"], limit_seconds=1.0)
    assert 2.9 < time.monotonic() - start < 10
    assert checkpoint(folder) == "SIGINT"


@pytest.mark.slow
def test_after_a_ctrl_c_the_output_is_read_to_its_end_and_the_promise_told(folder):
    lines: list[str] = []

    def emit(line: str) -> None:
        lines.append(line)
        if line.startswith("working"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, worker(0.5), emit=emit)
    assert lines[-2:] == [
        "interrupted: stopped in epoch 3",
        "will go on from its checkpoint with the next run (stopped in epoch 3)",
    ]
    assert checkpoint(folder) == "SIGINT"
    assert (folder / "train.log").read_text().endswith("interrupted: stopped in epoch 3\n")
