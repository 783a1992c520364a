import sys

import tasks.progress
from tasks.progress import progress


def test_a_log_gets_a_line_now_and_then_and_not_for_every_step(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(tasks.progress.time, "monotonic", lambda: float(next(clock)))
    with progress("Decoding", 1000) as advance:
        for _ in range(6):
            advance(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Decoding: 300 of 1,000 images, 10/s", "Decoding: 600 of 1,000 images, 10/s"]


def test_an_unknown_total_is_left_out(capsys, monkeypatch):
    clock = iter([0.0, 100.0])
    monkeypatch.setattr(tasks.progress.time, "monotonic", lambda: next(clock))
    with progress("Reading", None, "files") as advance:
        advance(250)
    assert capsys.readouterr().out == "Reading: 250 files, 2.5/s\n"


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with progress("Decoding", 10) as advance:
        advance(10)
    assert "Decoding" in capsys.readouterr().out
