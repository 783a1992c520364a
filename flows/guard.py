"""Keeps a command's process group from outliving the flow that started it, and lets it end in order.

Run as ``python guard.py GRACE_SECONDS COMMAND…`` with a pipe as standard input: the lifeline. The flow holds its other
end and never writes to it. When it closes, on purpose or because the flow was killed, the command's process
group gets SIGINT and, when the grace has passed, SIGKILL. Until then whatever runs in the group may save its work.

Why SIGINT: it is a Ctrl-C, which DVC sits out while a stage runs. SIGTERM ends DVC at once: it loses the stage's exit
code, and leaves locks that are held by a process number, which after a restart may be anybody's.

Why not PR_SET_PDEATHSIG: it reaches one process and not that one's children, it fires when the starting *thread*
ends, it needs code between fork and exec, which is unsafe beside a server's threads, and it is Linux only.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

LIFELINE, OUTPUT = 0, 1
_BETWEEN_LOOKS_SECONDS = 0.1


def main(grace_seconds: float, command: list[str]) -> int:
    """Run ``command`` in a process group of its own and pass its output on; return its exit code as a shell would."""
    told_to_stop = False

    def stop(*_: object) -> None:
        nonlocal told_to_stop
        told_to_stop = True

    # Whoever stops a whole service sends this to every process of it.
    signal.signal(signal.SIGTERM, stop)
    # A script's "command &" ignores SIGINT, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
        )
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", flush=True)
        return 127
    assert child.stdout
    source = child.stdout.fileno()
    watched = [LIFELINE, source]
    deadline = None
    while True:
        ready, _, _ = select.select(watched, [], [], _BETWEEN_LOOKS_SECONDS)
        if source in ready and not _pass_on(source):
            watched.remove(source)
        if LIFELINE in ready:
            watched.remove(LIFELINE)
            told_to_stop = True
        code = child.poll()
        # A command that a signal killed may have left others at work, which are ended in order, too.
        if deadline is None and (told_to_stop or (code is not None and code < 0)):
            _signal_group(child.pid, signal.SIGINT)
            deadline = time.monotonic() + grace_seconds
        if deadline is None and code is not None:
            break
        if deadline is not None and (not _signal_group(child.pid, 0) or time.monotonic() >= deadline):
            break
    _signal_group(child.pid, signal.SIGKILL)  # what is left of it
    code = child.wait()
    while source in watched and select.select([source], [], [], 0)[0] and _pass_on(source):
        pass
    return code if code >= 0 else 128 - code


def _pass_on(source: int) -> bool:
    """Hand on what there is to read; False at the end. With nobody to read it any more the command goes on saving."""
    chunk = os.read(source, 65536)
    with contextlib.suppress(BrokenPipeError):
        while chunk and (written := os.write(OUTPUT, chunk)) < len(chunk):
            chunk = chunk[written:]
    return bool(chunk)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to the group; False if there is nobody in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # the latter where only dead processes are left (macOS)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
