import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from tasks.signals import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handler_before_it_comes_back(number):
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop == []
        os.kill(os.getpid(), number)
        assert stop == [number]
    assert signal.getsignal(number) is before


def test_a_second_one_meets_the_handler_that_was_there_before():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop == seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_than_the_main_one_leaves_signals_alone():
    found = []

    def work():
        with stop_requests() as stop:
            found.append((stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [([], signal.getsignal(signal.SIGTERM))]


def test_a_signal_stack_that_is_gone_does_no_harm():
    program = """
        import ctypes, mmap, os, signal
        from tasks.signals import _Stack, stop_requests
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        where = libc.mmap(None, ctypes.c_size_t(65536), 3, 0x22, -1, ctypes.c_long(0))
        libc.sigaltstack(ctypes.byref(_Stack(where, 0, 65536)), None)
        libc.munmap(ctypes.c_void_p(where), ctypes.c_size_t(65536))
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        print(stop)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[15]\n")
