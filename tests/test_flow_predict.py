"""The flow that classifies, on threads, Dask and Ray, with workers killed and objects in S3; and its shards."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import pytest

from flows import runners
from flows.predict import holds_images, predict
from tasks import prediction
from tasks.errors import NightlyError
from tasks.images import encode_png
from tasks.inputs import open_input
from tasks.outcome import PredictParams
from tasks.plan import missing_shards, part_name, unfinished
from tasks.predict import predict as classify
from tasks.store import PARTS
from tests.conftest import COLORS, colored_image
from tests.object_store import s3

#: One temporary Prefect server for all of a process's tests.
SHARD_FILES = 5


def write_images(folder: Path, count: int, scale: int = 1) -> Path:
    """Write images of all colors, and one that is none."""
    for index in range(count):
        name = list(COLORS)[index % 3]
        pixels = colored_image(name, 700 + index).repeat(scale, 0).repeat(scale, 1)
        (folder / f"{index}.png").write_bytes(encode_png(pixels))
    (folder / "7-damaged.png").write_bytes(encode_png(pixels)[:50])
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """26 small files, six shards."""
    return write_images(tmp_path_factory.mktemp("images"), 25)


@pytest.fixture(scope="session")
def slow_images(tmp_path_factory) -> Path:
    """28 files of 3200 px, of which a core decodes about four a second."""
    return write_images(tmp_path_factory.mktemp("slow"), 27, 400)


def unbroken(source: Path, exported: Path, out: Path) -> dict[str, bytes]:
    """Return the content of the tables as one process makes them in one go."""
    classify(source, out, exported, PredictParams(shard_files=SHARD_FILES))
    return tables(out)


def tables(out: Path) -> dict[str, bytes]:
    files = [*out.joinpath(PARTS).iterdir(), out / "predictions.csv"]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def expected(images, exported, tmp_path_factory) -> dict[str, bytes]:
    return unbroken(images, exported, tmp_path_factory.mktemp("expected") / "out")


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "params.yaml").write_text(f"predict: {{shard_files: {SHARD_FILES}}}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runners.classify_shard, "retry_delay_seconds", 0)
    return tmp_path


def task_runs(state, count: int) -> Counter[str]:
    """Return how often each task run's name and last state are on the server."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    deadline = time.monotonic() + 20
    with get_client(sync_client=True) as client:
        while True:  # task runs reach the server through a stream of events, a little later
            runs = client.read_task_runs(flow_run_filter=this_run, limit=100, offset=0)
            found = Counter(f"{run.name} {run.state_name}" for run in runs)
            if len(runs) >= count and all(run.state and run.state.is_final() for run in runs):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)


class Killer(threading.Thread):
    """Kills one worker as soon as the first part of a result is there."""

    def __init__(self, out: Path, mark: str) -> None:
        super().__init__()
        self.store = unfinished(str(out))
        self.mark = mark
        self.parts = None

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while self.parts is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if (parts := self.store.names(PARTS)) and (victim := next(self.workers(), None)):
                victim.send_signal(signal.SIGKILL)
                self.parts = parts

    def workers(self) -> Iterator[psutil.Process]:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.mark in " ".join(process.cmdline()):
                    yield process


# --- on workers


@pytest.mark.slow
def test_threads_make_the_same_bytes_as_one_process(workspace, server, images, exported, expected):
    state = predict(images, "labels", exported, on="threads", workers=3, return_state=True)
    done = state.result()
    assert tables(workspace / "labels") == expected
    assert done.note == f"25 of 26 files in {images} classified with {done.facts['engine']}"
    assert done.table == "labels/predictions.parquet"
    assert done.facts["statuses"] == {"ok": 25, "truncated": 1}
    assert task_runs(state, 6) == Counter(f"shard {number} Completed" for number in range(6))
    assert prediction._load.cache_info().currsize == 0


@pytest.mark.slow
@pytest.mark.parametrize(("on", "mark"), [("dask", "spawn_main"), ("ray", "ray::shard")])
def test_a_killed_worker_costs_nothing_but_its_shard(workspace, server, slow_images, exported, on, mark):
    killer = Killer(workspace / "labels", mark)
    killer.start()
    state = predict(slow_images, "labels", exported, on=on, workers=2, return_state=True)
    killer.join()
    assert state.result().facts["statuses"] == {"ok": 27, "truncated": 1}
    assert 0 < len(killer.parts) < 6
    assert tables(workspace / "labels") == unbroken(slow_images, exported, workspace / "unbroken")
    assert task_runs(state, 6) == Counter(f"shard {number} Completed" for number in range(6))


@pytest.mark.slow
def test_images_and_result_in_s3_with_a_cluster_that_runs_already(workspace, server, images, exported, expected):
    import fsspec
    from distributed import LocalCluster

    with (
        s3() as bucket,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
    ):
        files, root = fsspec.url_to_fs(bucket)
        files.put(f"{images}/", f"{root}/holiday/", recursive=True)
        arguments = {"on": "dask", "address": cluster.scheduler_address}
        done = predict(f"{bucket}/holiday", f"{bucket}/labels", exported, **arguments)
        assert done.note.startswith(f"25 of 26 files in {bucket}/holiday classified with ")
        assert done.table == f"{bucket}/labels/predictions.parquet"
        found = {path.rsplit("/")[-1]: files.cat_file(path) for path in files.find(f"{root}/labels")}
        assert {name: found[name] for name in expected} == expected
        assert found.keys() - expected == {"plan.json", "files.parquet", "summary.json"}

        files.rm(f"{root}/labels/{PARTS}/{part_name(3)}")
        again = predict(f"{bucket}/holiday", f"{bucket}/labels", exported, **arguments)
        assert again.facts["resumed_files"] == 21
        assert files.cat_file(f"{root}/labels/{PARTS}/{part_name(3)}") == expected[part_name(3)]


@pytest.mark.slow
def test_a_shard_that_fails_is_tried_again(workspace, server, images, exported, expected, monkeypatch):
    tries = failing_shard(monkeypatch, {2: 2})
    state = predict(images, "labels", exported, on="threads", return_state=True)
    assert state.is_completed(), state.message
    assert tries == Counter({2: 3})
    assert tables(workspace / "labels") == expected


def failing_shard(monkeypatch, failures: dict[int, int]) -> Counter[int]:
    """Make the first so many tries of some shards fail; return where their tries are counted."""
    tries = Counter()
    works = prediction.classify_shard

    def fails(order, shard):
        if shard in failures:
            tries[shard] += 1
            if tries[shard] <= failures[shard]:
                raise OSError(5, "Input/output error", "disk")
        return works(order, shard)

    monkeypatch.setattr(prediction, "classify_shard", fails)
    return tries


@pytest.mark.slow
def test_after_a_failure_that_stays_the_same_call_goes_on(workspace, server, images, exported, expected, monkeypatch):
    call = partial(predict, images, model=exported, on="threads", options={"formats": ["csv"]})
    with monkeypatch.context() as patch:
        failing_shard(patch, {1: 9, 4: 9})
        state = call(return_state=True)
    assert state.is_failed()
    assert (
        "2 of 6 shards failed, also when tried again (part-00001.parquet: Input/output error (disk); "
        "part-00004.parquet: Input/output error (disk)); the same call goes on with what is missing"
    ) in state.message
    [left] = (workspace / "data" / "predictions").glob(".*.unfinished")
    assert unfinished(str(left.with_name(left.name[1:].removesuffix(".unfinished")))).names(PARTS) == {
        part_name(shard) for shard in (0, 2, 3, 5)
    }
    done = call()
    assert done.facts["resumed_files"] == 16
    [out] = (workspace / "data" / "predictions").iterdir()
    assert tables(out) == expected
    assert done.table == f"data/predictions/{out.name}/predictions.parquet"


@pytest.mark.slow
def test_a_process_of_its_own_takes_the_same_options(workspace, server, images, exported, expected):
    with pytest.raises(NightlyError, match=r"'predict\.top_k': input should be greater than or equal to 1, but is 0"):
        predict(images, "labels", exported, options={"top_k": 0})
    predict(images, "labels", exported, options={"top_k": 1, "formats": ["csv"]})
    assert tables(workspace / "labels").keys() == expected.keys()
    assert tables(workspace / "labels") != expected
    unfinished("labels").write("plan/plan.json", b"{}")
    predict(images, "labels", exported, fresh=True)
    assert tables(workspace / "labels") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, r"there is nothing at '.*/nowhere': give a folder of images"),
        ({"source": "-"}, "source '-' is for the command line: give a flow a text file of paths"),
        ({"workers": 2}, "'address' and 'workers' are for on='threads', 'dask' or 'ray', but on is 'process'"),
        ({"on": "threads", "address": "x:1"}, "'address' is a Dask scheduler's or Ray head's, but on is 'threads'"),
        ({"on": "dask", "address": "x:1", "workers": 2}, "'workers' is for this machine, but the cluster at x:1 has"),
        (
            {"on": "dask", "address": "tcp://127.0.0.1:9"},
            r"no Dask cluster answers at tcp://127.0.0.1:9 \(Connection refu",
        ),
        ({"on": "dask", "address": "tls://[::1]:9"}, r"no Dask cluster answers at tls://\[::1\]:9 \("),
        ({"on": "dask", "address": "tcp://cluster"}, r"answers at tcp://cluster \(an address ends with :port"),
        ({"on": "ray"}, r"on='ray' needs prefect-ray: pip install 'resnet-nightly\[ray\]'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(workspace, server, images, exported, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(NightlyError, match=message):
        predict(**{"source": images, "model": exported, **arguments})
    assert not (workspace / "data").exists()


# --- one shard in any process


@pytest.fixture
def order(images, exported, tmp_path):
    """Return a function that plans a prediction and gives its order and its store."""

    def plan(fresh=False, **params):
        params = PredictParams(shard_files=SHARD_FILES, **params)
        out = str(tmp_path / "labels")
        files = open_input(str(images), tmp_path)
        planned, _ = prediction.plan_prediction(str(images), out, exported, params, files, fresh=fresh)
        return prediction.make_order(planned), planned

    yield plan
    prediction.unload()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["keras", "openvino"])
def test_threads_share_an_engine_and_disturb_nobody(order, engine, images, exported, tmp_path, monkeypatch):
    opened = []
    works = prediction.open_engine
    monkeypatch.setattr(prediction, "open_engine", lambda *a, **k: opened.append(a) or works(*a, **k))
    order, planned = order(engine=engine)
    counts = {}
    # Each shard by two threads at once.
    work = [lambda n=n: counts.update({n: prediction.classify_shard(order, n // 2)}) for n in range(12)]
    threads = [threading.Thread(target=target) for target in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [counts[n] for n in range(12)] == [5] * 10 + [1] * 2
    assert len(opened) == 1
    alone = tmp_path / "alone"
    classify(images, alone, exported, planned.params)
    for name in planned.store.names(PARTS):
        assert planned.store.read(f"{PARTS}/{name}") == (alone / PARTS / name).read_bytes()


@pytest.mark.slow
def test_an_order_goes_to_another_process_as_json_where_threads_do_not_begin_together(order, images, expected):
    program = """
import json, os, sys, threading
from tasks import engines
from tasks.prediction import Order, classify_shard

# Two threads that bring OpenVINO their first arrays at the same moment may wait for each other for ever.
together, padded = threading.Barrier(2, timeout=0.5), engines.Engine._padded

def alone(self, batch):
    try:
        together.wait()
    except threading.BrokenBarrierError:
        return padded(self, batch)
    os._exit(1)

engines.Engine._padded = alone
order = Order(**json.loads(sys.argv[1]))
threads = [threading.Thread(target=classify_shard, args=(order, shard)) for shard in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    order, planned = order()
    command = [sys.executable, "-c", program, json.dumps(asdict(order))]
    subprocess.run(command, check=True, timeout=60)
    assert missing_shards(planned.store, planned.plan) == []
    for name in planned.store.names(PARTS):
        assert planned.store.read(f"{PARTS}/{name}") == expected[name]


def test_a_part_that_is_there_stays(order):
    order, planned = order()
    planned.store.write(f"{PARTS}/{part_name(5)}", b"rows")
    assert prediction.classify_shard(order, 5) == 1
    assert planned.store.read(f"{PARTS}/{part_name(5)}") == b"rows"


def test_a_part_that_nobody_planned_does_not_count(order):
    plan_again = order
    _, planned = plan_again()
    planned.store.clear()
    planned.store.write(f"{PARTS}/{part_name(5)}", b"of a worker that was given up")
    _, planned = plan_again()
    assert missing_shards(planned.store, planned.plan) == list(range(6))


def test_a_worker_with_other_files_is_refused(order):
    plan_again = order
    order, planned = plan_again()
    prediction.classify_shard(order, 0)
    changed, _ = plan_again(fresh=True, top_k=1)
    assert changed != order
    prediction.unload()
    with pytest.raises(NightlyError, match="holds another plan: all workers must see the same files"):
        prediction.classify_shard(order, 0)
    planned.store.clear()
    with pytest.raises(NightlyError, match="holds no plan: all workers must see the same files"):
        prediction.classify_shard(changed, 0)


# --- the end of a night


def test_a_folder_of_side_files_holds_no_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    assert not holds_images(tmp_path)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.png").touch()
    assert holds_images(tmp_path)
