"""Keeps a command's process group from outliving the flow that started it.

Run as ``python guard.py GRACE_SECONDS COMMAND…`` with a pipe as standard input: the lifeline. The flow holds its other
end and never writes to it. When it closes, on purpose or because the flow was killed, the command's process
group gets SIGTERM and, after the grace, SIGKILL.

Why not PR_SET_PDEATHSIG: it reaches one process and not that one's children, it fires when the starting *thread*
ends, it needs code between fork and exec, which is unsafe beside a server's threads, and it is Linux only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time


def main(grace_seconds: float, command: list[str]) -> int:
    """Run ``command`` in a process group of its own; return its exit code as a shell would."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", flush=True)
        return 127
    threading.Thread(target=_watch, args=(child.pid, grace_seconds), daemon=True).start()
    code = child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # what the command left running
    return code if code >= 0 else 128 - code


def _watch(group: int, grace_seconds: float) -> None:
    while os.read(0, 1):  # blocks until the lifeline closes
        pass
    _signal_group(group, signal.SIGTERM)
    time.sleep(grace_seconds)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    # Not sys.exit: it would wait for the thread that blocks on the lifeline.
    os._exit(main(float(sys.argv[1]), sys.argv[2:]))
