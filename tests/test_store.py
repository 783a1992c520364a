import gc
import os
import sys
import uuid

import numpy as np
import pytest

from tasks.errors import NightlyError
from tasks.inputs import Listing
from tasks.plan import changed_files, read_shard, write_plan
from tasks.store import FILES, LocalStore, RemoteStore, is_remote, open_store
from tests.object_store import s3


@pytest.fixture(scope="module")
def bucket():
    with s3() as address:
        yield address


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def store(request, tmp_path):
    if request.param == "local":
        return open_store(str(tmp_path / "result"))
    root = "memory://bucket" if request.param == "memory" else request.getfixturevalue("bucket")
    return open_store(f"{root}/{uuid.uuid4().hex}")


def test_what_is_written_is_there_and_nothing_else(store):
    assert store.read("plan/plan.json") is None
    assert not store.exists("plan/plan.json")
    assert store.names("plan") == set()
    store.write("plan/plan.json", b"{}")
    store.write("plan/files.parquet", b"rows")
    store.write("plan/plan.json", b"{1}")
    assert store.read("plan/plan.json") == b"{1}"
    assert store.exists("plan/plan.json")
    assert not store.exists("plan/plan.jso")
    assert store.names("plan") == {"plan.json", "files.parquet"}
    assert open_store(store.location).read("plan/files.parquet") == b"rows"


def test_what_another_one_wrote_is_seen_at_once(store):
    assert store.names("parts") == set()
    assert not store.exists("parts/1")
    other = open_store(store.location)
    other.write("parts/1", b"x")
    assert store.exists("parts/1")
    assert store.names("parts") == {"1"}


def test_a_file_whose_writing_fails_is_not_there_and_an_older_one_stays(store):
    def fail(name):
        with pytest.raises(OSError, match="disk is full"), store.writing(name) as file:
            file.write(b"half")
            raise OSError("the disk is full")

    fail("parts/new")
    store.write("parts/old", b"whole")
    fail("parts/old")
    gc.collect()  # a forgotten file of fsspec's would send what it has
    assert store.names("parts") == {"old"}
    assert store.read("parts/old") == b"whole"


def test_several_writers_of_one_file_disturb_nobody(store):
    with store.writing("parts/1") as first:
        first.write(b"same ")
        with store.writing("parts/1") as second:
            second.write(b"same rows")
        assert store.read("parts/1") == b"same rows"
        first.write(b"rows")
    assert store.read("parts/1") == b"same rows"
    assert store.names("parts") == {"1"}


def test_clearing_takes_the_result_and_leaves_what_is_beside_it(store):
    store.write("plan/plan.json", b"{}")
    store.write("predictions.parquet/part-00000.parquet", b"rows")
    store.write("summary.json", b"{}")
    beside = RemoteStore(store.location) if is_remote(store.location) else LocalStore(store.folder.parent)
    beside.write("holiday.jpg", b"pixels")
    beside.write("plan/of-the-house.jpg", b"pixels")
    store.clear()
    assert store.read("plan/plan.json") is None
    assert store.names("predictions.parquet") == set()
    assert not store.exists("summary.json")
    assert beside.read("holiday.jpg") == beside.read("plan/of-the-house.jpg") == b"pixels"
    store.clear()


@pytest.mark.slow
def test_a_browser_is_told_that_the_report_is_a_page(bucket):
    import fsspec

    store = open_store(f"{bucket}/report")
    store.write("report.html", b"<p>")
    assert fsspec.url_to_fs(bucket)[0].info(f"{bucket}/report/report.html")["ContentType"] == "text/html"


# --- a local result


@pytest.mark.slow
def test_of_a_long_plan_at_an_address_a_shard_fetches_its_own_part(bucket, monkeypatch):
    import s3fs

    fetched = []
    works = s3fs.core.S3File._fetch_range

    def counted(self, start, end):
        fetched.append(end - start)
        return works(self, start, end)

    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", counted)
    paths = [f"{uuid.uuid5(uuid.NAMESPACE_URL, str(number)).hex}.jpg" for number in range(50_000)]
    listing = Listing(paths, np.zeros(len(paths), np.int64), np.zeros(len(paths), np.int64))
    store = open_store(f"{bucket}/{uuid.uuid4().hex}")
    plan = write_plan(store, {}, listing, shard_files=1000)
    assert read_shard(store, 7) == paths[7000:8000]
    assert sum(fetched) < len(store.read(FILES)) / plan.shards * 4
    assert changed_files(store, listing) == 0
    listing.paths[3] = "another.jpg"
    assert changed_files(store, listing) == 2


def test_publishing_replaces_the_older_result_and_leaves_what_killed_writers_left(tmp_path):
    out = tmp_path / "labels"
    out.mkdir()
    (out / "old").touch()
    store = LocalStore(tmp_path / ".labels.unfinished")
    store.write("predictions.parquet/part-00000.parquet", b"rows")
    killed = store.writing("predictions.parquet/part-00000.parquet")
    killed.__enter__().write(b"half")
    store.publish(out)
    assert sorted(os.listdir(tmp_path)) == ["labels"]
    assert [path.name for path in out.rglob("*")] == ["predictions.parquet", "part-00000.parquet"]
    with pytest.raises(FileNotFoundError):
        killed.__exit__(None, None, None)


def test_a_file_may_be_read_by_whom_the_umask_says(tmp_path):
    store = LocalStore(tmp_path)
    before = os.umask(0o027)
    try:
        store.write("table", b"rows")
    finally:
        os.umask(before)
    assert (tmp_path / "table").stat().st_mode & 0o777 == 0o640


def test_one_process_at_a_time_writes_a_result(tmp_path):
    store = LocalStore(tmp_path / "result")
    with store.locked(), pytest.raises(NightlyError, match="another process is writing this result already"):
        LocalStore(tmp_path / "result").locked().__enter__()
    with store.locked():
        pass
    assert os.listdir(tmp_path) == []


# --- addresses


def test_an_address_is_no_path():
    assert is_remote("s3://bucket/prefix")
    assert not is_remote("/data/s3:/bucket")


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(NightlyError, match=r"^'gopher://x/y' cannot be opened: Protocol not known: gopher$"):
        open_store("gopher://x/y")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # Not s3://, whose file system this process has loaded.
    with pytest.raises(NightlyError, match=r"'s3a://x/y' cannot be opened: .*install resnet-nightly\[s3\]"):
        open_store("s3a://x/y")
