import json
import logging
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from flows.notify import (
    Record,
    events_of,
    faults,
    last_success,
    nights,
    notify,
    record_night,
)
from flows.settings import RetrainParams
from flows.workspace import Workspace
from tasks.errors import NightlyError
from tasks.params import parse_section

# One of the plugins, which all are loaded with the first address.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

SECRET = "s3cr3t"


def addresses(text: str):
    return parse_section({"notify": yaml.safe_load(text)}, "retrain", RetrainParams, Path("params.yaml")).notify


@contextmanager
def listening(status: int = 200, pause: threading.Event | None = None):
    """An HTTP server on loopback; yields its address for apprise and the messages that it gets."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if pause:
                pause.wait(10)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"json://me:{SECRET}@127.0.0.1:{server.server_port}/{SECRET}", got
    finally:
        if pause:
            pause.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_message_arrives_as_it_was_written():
    with listening() as (address, got):
        assert (
            notify(addresses(f"['{address}']"), ["promote"], "Promoted <b> & co.", "first line\nsecond: 98.7 %") == []
        )
    [message] = got
    assert message["title"] == "Promoted <b> & co."
    assert message["message"] == "first line\nsecond: 98.7 %"
    assert message["type"] == "success"


@pytest.mark.parametrize(("event", "kind"), [("failure", "failure"), ("hold", "warning"), ("recovery", "success")])
def test_only_those_who_want_to_hear_of_it_are_told(event, kind):
    with listening() as (one, all_of_it), listening() as (other, some):
        chosen = addresses(f"['{one}', {{to: '{other}', on: [failure, recovery]}}]")
        assert notify(chosen, [event], "t", "b") == []
    assert [message["type"] for message in all_of_it] == [kind]
    assert len(some) == (event != "hold")


def test_an_environment_variable_stands_for_an_address_or_a_part_of_it(monkeypatch):
    with listening() as (address, got):
        monkeypatch.setenv("NIGHTLY_TEST_ADDRESS", address)
        monkeypatch.setenv("NIGHTLY_TEST_PORT", address.split(":")[-1].split("/")[0])
        chosen = addresses("['${NIGHTLY_TEST_ADDRESS}', 'json://127.0.0.1:${NIGHTLY_TEST_PORT}']")
        assert notify(chosen, ["hold"], "t", "b") == []
        assert faults(chosen) == []
    assert len(got) == 2
    monkeypatch.delenv("NIGHTLY_TEST_ADDRESS")
    missing = "retrain.notify, address 1 (${NIGHTLY_TEST_ADDRESS}): the environment variable NIGHTLY_TEST_ADDRESS"
    assert faults(chosen) == [f"{missing} is not set"]
    assert notify(chosen[:1], ["hold"], "t", "b") == [f"notification failed: {missing} is not set"]


def test_one_that_answers_500_one_that_hangs_and_one_that_is_away_hold_up_nobody():
    released = threading.Event()
    with listening(500) as (bad, _), listening(pause=released) as (slow, asked), listening() as (good, got):
        with listening() as (away, _):
            """Its port is free again now."""
        chosen = addresses(yaml.safe_dump([bad, slow, away, f"nosuch://{SECRET}", good]))
        started = time.monotonic()
        troubles = notify(chosen, ["failure"], "t", "b", limit_seconds=1.5)
        assert time.monotonic() - started < 3
        assert len(got) == len(asked) == 1
        # The one that still waits would hold up the end of the process, too, if it were not a daemon.
        waiting = [thread for thread in threading.enumerate() if thread.name.startswith("notification")]
        assert [thread.daemon for thread in waiting] == [True]
    assert troubles == [
        "notification failed: retrain.notify, address 1 (json://…): it answered with status 500",
        "notification failed: retrain.notify, address 2 (json://…): no answer within 1.5 s",
        "notification failed: retrain.notify, address 3 (json://…): it could not be reached, or refused",
        "notification failed: retrain.notify, address 4 (nosuch://…): apprise can't make sense of it: "
        "see its list of services",
    ]


def test_nothing_of_an_address_is_logged_or_shown(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("apprise").setLevel(logging.DEBUG)
    with listening(404) as (address, _):
        chosen = addresses(yaml.safe_dump([address, f"slack://{SECRET}", f"nosuch://{SECRET}"]))
        shown = [*notify(chosen, ["failure"], "t", "b"), *faults(chosen), repr(chosen), chosen[0].kind]
    logging.getLogger("apprise").setLevel(logging.NOTSET)
    shown += [record.getMessage() for record in caplog.records] + list(capfd.readouterr())
    assert SECRET not in "\n".join(shown)
    # Others may still use the library, and hear of it.
    logging.getLogger("apprise").warning("somebody else's")
    assert "somebody else's" in caplog.text


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (f"slack://{SECRET}", "'retrain.notify': input should be a valid tuple, but is ***"),
        (f"[{SECRET}]", "'retrain.notify.0.to': must be an address of apprise such as"),
        (f"[{{to: 'json://{SECRET}', on: [promotion]}}]", "'retrain.notify.0.on.0': input should be 'promote', 'hold'"),
        (f"[{{to: 'json://{SECRET}', on: []}}]", "'retrain.notify.0.on': tuple should have at least 1 item"),
        (f"[{{'json://{SECRET}': [hold]}}]", "'retrain.notify.0.to': field required"),
        (f"[{{too: 'json://{SECRET}'}}]", "unknown key 'retrain.notify.0.too', did you mean 'to'?"),
        (f"[['json://{SECRET}']]", "'retrain.notify.0': input should be a valid dictionary"),
    ],
)
def test_a_wrong_parameter_is_refused_without_repeating_the_address(written, complaint):
    with pytest.raises(NightlyError) as error:
        addresses(written)
    assert complaint in str(error.value)
    assert SECRET not in str(error.value)


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


def test_records_are_kept_in_order_and_a_torn_line_costs_only_itself(workspace):
    started = datetime.now(UTC) - timedelta(seconds=90)
    first = record_night(workspace, "n1", "promoted", started, "promoted: the first model — 98.70 %")
    file = workspace.state / "nights.jsonl"
    with file.open("a") as torn:
        torn.write('{"run": "n2", "sta')
    second = record_night(workspace, "n3", "failed", started, "failed: train: \udcff")
    assert nights(workspace)[0] == first
    assert [record.run for record in nights(workspace)] == ["n1", "n3"]
    assert second.seconds == pytest.approx(90, abs=5)
    assert len(file.read_text().splitlines()) == 3


def test_last_success_is_the_end_of_the_last_night_that_came_to_one(workspace):
    assert last_success(workspace) is None
    started = datetime.now(UTC)
    record_night(workspace, "n0", "failed", started, "failed")
    assert last_success(workspace) is None
    for run, state in (("n1", "promoted"), ("n2", "unchanged"), ("n3", "skipped"), ("n4", "interrupted")):
        record_night(workspace, run, state, started, state)
    lines = (workspace.state / "nights.jsonl").read_text().splitlines()
    ended = json.loads(lines[2])["ended"]
    assert last_success(workspace) == datetime.fromisoformat(ended)
    assert last_success(workspace).tzinfo is not None


@pytest.mark.parametrize(
    ("earlier", "state", "events"),
    [
        ("", "promoted", ["promote"]),
        ("", "held", ["hold"]),
        ("", "unchanged", []),
        ("failed", "failed", ["failure"]),
        ("failed", "skipped", []),
        ("failed", "interrupted", []),
        ("failed", "unchanged", ["recovery"]),
        ("failed", "promoted", ["promote", "recovery"]),
        ("failed skipped interrupted", "held", ["hold", "recovery"]),
        ("failed unchanged", "held", ["hold"]),
    ],
)
def test_what_there_is_to_tell(earlier, state, events):
    records = [Record(f"n{i}", state, "", "", 0, "") for i, state in enumerate(earlier.split())]
    assert events_of(state, records) == events
