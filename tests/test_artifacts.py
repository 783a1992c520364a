"""How far a stage is, told by its lines; and that nothing is lost where nobody takes it."""

import httpx
import pytest

from flows import artifacts
from flows.artifacts import Progress, share_done, show


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("epoch 3/12: loss 1.2672, accuracy 0.6661, validation loss 0.8907, accuracy 0.8579", 0.25),
        ("Training: 1,200 of 4,800 steps, 9.5/s", 0.25),
        ("Training the head: 15 of 30 steps, 1,234/s", 0.5),
        ("Decoding: 60,000 of 60,000 images, 8,100/s", 1.0),
        ("Reading: 0 of 0 images, 0/s", None),
        ("Reading: 1,234 images, 100/s", None),
        ("training stopped by SIGINT after epoch 3/12: the same command goes on", None),
        ("keras-float32: same label as Keras on 100.00% of the validation images", None),
    ],
)
def test_a_line_says_how_far_a_stage_is(line, share):
    assert share_done(line) == share


@pytest.fixture
def server(monkeypatch):
    """A server that writes down what it is told, while ``there``."""

    class Server:
        there = True

        def __init__(self):
            self.told: list[tuple] = []
            self.asked = 0

        def take(self, *what):
            self.asked += 1
            if not self.there:
                raise httpx.ConnectError("Connection refused")
            self.told.append(what)
            return "id"

    server = Server()
    for verb in ("create_progress", "update_progress", "create_markdown"):
        monkeypatch.setattr(
            artifacts, f"{verb}_artifact", lambda *args, verb=verb, **more: server.take(verb, *args, more)
        )
    return server


def test_a_bar_appears_with_the_first_epoch_moves_now_and_then_and_ends_full(server, monkeypatch):
    progress = Progress("train", print)
    progress.done()
    progress.hear("training on 2 cores")
    assert server.told == []
    for epoch in range(1, 4):
        progress.hear(f"epoch {epoch}/4: loss 1")
    assert server.told == [("create_progress", 25.0, {"key": "train-progress", "description": "epoch 1/4: loss 1"})]
    monkeypatch.setattr(artifacts, "BETWEEN_UPDATES_SECONDS", 0)
    progress._next = 0.0
    progress.hear("epoch 4/4: loss 1")
    progress.done()
    assert server.told[1:] == [("update_progress", "id", 100.0, {"description": "epoch 4/4: loss 1"})] * 2


def test_without_a_server_a_bar_waits_and_appears_later(server, monkeypatch):
    warnings: list[str] = []
    progress = Progress("train", warnings.append)
    server.there = False
    for epoch in range(1, 4):
        progress.hear(f"epoch {epoch}/4: loss 1")
    assert (server.asked, len(warnings)) == (1, 1)
    assert "the server did not take it (Connection refused)" in warnings[0]
    server.there = True
    progress._next = 0.0
    progress.hear("epoch 4/4: loss 1")
    assert [verb for verb, *_ in server.told] == ["create_progress"]


def test_without_a_server_a_night_ends_as_it_would_with_one(server):
    warnings: list[str] = []
    server.there = False
    show("night", "# Promoted", "promoted", warnings.append)
    assert len(warnings) == 1
