"""Tests storage: a Location is one place in any spelling, writes are atomic, and errors have a fix and can be sent between
processes."""

import errno
import inspect
import os
import pickle
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat import errors
from heliostat.errors import AccessError, ConfigError, DataError, HeliostatError, StorageError
from heliostat.storage import locations as storage
from heliostat.storage import retries
from heliostat.storage.locations import Location

ALL_ERRORS = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, HeliostatError)]


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Returns a port of this machine that is taken, but without a listening server."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        yield s.getsockname()[1]


@pytest.fixture
def no_endpoint(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_written_is_what_is_read(tmp_path, scheme):
    """Bytes of any size, to new folders, replace the earlier content."""
    place = Location(f"{scheme}{tmp_path}").join("a", "b", "c.bin")
    assert not place.exists() and place.name == "c.bin"
    for data in (b"x", b"", os.urandom(100_000)):
        place.write(data)
        assert place.read() == data == (tmp_path / "a/b/c.bin").read_bytes()
        with place.open() as f:
            assert f.size() == len(data) and f.read() == data
    assert place.exists()


@pytest.mark.parametrize("base", ["BASE", "file://BASE", "relative", "s3://bucket/base", "s3://bucket/base?region=x"])
@pytest.mark.parametrize("part", ["..", "../x", "a/../../x", "a/..", "/etc/passwd", "/"])
def test_no_part_of_a_path_leads_out_of_the_folder(tmp_path, base, part):
    with pytest.raises(DataError, match=r"is outside this folder"):
        Location(base.replace("BASE", str(tmp_path))).join("a", part)


@pytest.mark.parametrize("part", ["%2e%2e/x", "%2e%2e%2fx", "..\\x", "a..b/c..", "...", "a%00b", "a?b", ".", ".hidden/x"])
def test_names_that_only_look_like_a_way_out_stay_in_the_folder(tmp_path, part):
    """Neither a disk nor the S3 client decodes them a second time."""
    assert Location("s3://bucket/base").join(part).path == f"bucket/base/{part}"
    place = Location(str(tmp_path / "base")).join(part, "f")
    place.write(b"x")
    assert Path(os.path.realpath(place.path)).is_relative_to(tmp_path / "base")


def test_a_reader_never_sees_half_a_file(tmp_path):
    """While two threads overwrite a file with complete files, every read returns one of them. No other file remains."""
    place, versions = Location(str(tmp_path / "f")), [bytes([i]) * 300_000 for i in range(4)]
    place.write(versions[0])
    stop = threading.Event()

    def write(mine: list[bytes]) -> None:
        while not stop.is_set():
            for data in mine:
                place.write(data)

    writers = [threading.Thread(target=write, args=(versions[i : i + 2],)) for i in (0, 2)]
    for w in writers:
        w.start()
    try:
        seen = {place.read() for _ in range(200)}
    finally:
        stop.set()
        for w in writers:
            w.join()
    assert seen <= set(versions) and len(seen) > 1
    assert place.read() in versions
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """After an error in the middle of a write, the old bytes are still there, without a partial file."""
    place = Location(str(tmp_path / "f"))
    place.write(b"old")

    def fill(out) -> None:
        out.write(b"new, but not all of it")
        raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        place._put(fill)
    assert place.read() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_upload_copies_a_file(tmp_path):
    """A file larger than one block arrives completely."""
    (tmp_path / "from").write_bytes(os.urandom((16 << 20) + 12_345))
    Location(str(tmp_path)).join("x", "to").upload(tmp_path / "from")
    assert (tmp_path / "x" / "to").read_bytes() == (tmp_path / "from").read_bytes()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_listing_finds_every_file_and_folder_and_nothing_else(tmp_path, scheme, seed):
    """files() is recursive with sizes, and folders() lists one level. Both are sorted, relative, and empty for a missing
    place."""
    rng, root = random.Random(seed), Location(f"{scheme}{tmp_path}")
    expected = {}
    for _ in range(rng.randrange(1, 25)):
        parts = [rng.choice("abc") * 2 for _ in range(rng.randrange(3))] + [f"{rng.choice('xyz')}{rng.randrange(99)}"]
        expected["/".join(parts)] = data = bytes(rng.randrange(50))
        root.join(*parts).write(data)
    assert root.files() == sorted((p, len(d)) for p, d in expected.items())
    assert root.folders() == sorted({p.split("/")[0] for p in expected if "/" in p})
    assert root.join("nothing", "here").files() == [] == root.join("nothing").folders()


@pytest.mark.parametrize("name", ["a b", "100%", "a%20b", "über", "x#y", "x?y=z", "a:b", "[1]", "~", "a=b&c"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_of_any_name_is_found_again(tmp_path, scheme, name):
    """join() reaches every name from files(): no character of a name is taken for a part of the URI."""
    (tmp_path / name).write_bytes(b"here")
    root = Location(f"{scheme}{tmp_path}")
    assert [root.join(path).read() for path, _ in root.files()] == [b"here"]


def test_delete_takes_a_file_or_a_folder_and_does_not_mind_nothing(tmp_path):
    """The whole tree is deleted, its neighbors stay, and a second deletion isn't an error."""
    root = Location(str(tmp_path))
    for path in ("a/x", "a/b/y", "c"):
        root.join(path).write(b"")
    for _ in range(2):
        root.join("a").delete()
        assert root.files() == [("c", 0)]
    root.join("c").delete()
    assert root.files() == []


def test_missing_files_are_file_not_found(tmp_path, no_sleep):
    """The error comes at once, without retries: a missing file is an answer, not a failure."""
    for operation in (Location(str(tmp_path / "no")).read, Location(str(tmp_path / "no")).open):
        with pytest.raises(FileNotFoundError):
            operation()
    assert no_sleep == []


def test_absolute_takes_relative_paths_from_the_root_and_leaves_the_rest():
    """Only a bare relative path changes. URIs and absolute paths stay the same."""
    root = Path("/workspace")
    assert str(Location("data/a").absolute(root)) == "/workspace/data/a"
    for uri in ("/data/a", "file:///data/a", "s3://bucket/a?region=eu-west-1"):
        assert str(Location(uri).absolute(root)) == uri


def test_paths_are_what_the_file_system_takes():
    """The path is bucket/key on S3, without the query, and an absolute path on disk. join keeps the query at the end."""
    s3 = Location("s3://bucket/key/?endpoint_override=h:1&scheme=http")
    assert s3.path == "bucket/key" and s3.is_s3
    assert str(s3.join("a", "b")) == "s3://bucket/key/a/b?endpoint_override=h:1&scheme=http"
    assert s3.join("a", "b").path == "bucket/key/a/b" and s3.join("a").name == "a"
    assert Location("file:///x/y").path == Location("/x/y").path == "/x/y" and not Location("/x").is_s3
    assert Location("x").path == str(Path.cwd() / "x")
    assert Location("s3://bucket/a#b").path == "bucket/a#b"


@pytest.mark.parametrize(
    ("told", "uri"),
    [
        *(("AWS_ACCESS_KEY_ID and AWS_SECRET", u) for u in ("s3://key:secret@b/x", "s3://AKIA@bucket", "s3://a:b@c/d?region=x")),
        *(("isn't supported. Use a path, file:// or s3://", u) for u in ("gs://b/x", "http://h/x", "hdfs://x", "S4://b")),
        *(("has no path", uri) for uri in ("", "s3://", "s3:///key", "s3:bucket/key")),
    ],
)
def test_a_uri_that_names_no_place_of_ours_is_refused(told, uri):
    """The error has an alternative, and no part of a secret. Without a bucket, the URI would mean the current folder, or
    everything."""
    with pytest.raises(ConfigError, match=told) as e:
        Location(uri)
    assert "secret" not in str(e.value) and (not told.startswith("AWS") or uri not in str(e.value))


def test_a_disk_that_takes_no_writes_is_no_store_that_may_come_back(tmp_path):
    """A read-only file system is rejected at once. A place that can't be created is reported before anything is written there."""

    def fail() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(AccessError, match="Read-only file system"):
        Location(str(tmp_path / "x")).attempt(fail)
    Location(str(tmp_path / "not" / "yet")).require_writable()
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    (tmp_path / "file").touch()
    for name in ("gone", "file"):
        with pytest.raises(AccessError, match=rf"can't write to the folder .*/{name}\. Use another location$"):
            Location(str(tmp_path / name / "runs")).require_writable()
    Location("s3://bucket/runs").require_writable()  # whether a bucket takes writes is found out by a write


def test_a_probe_reports_a_store_that_is_away_once(monkeypatch, caplog):
    """All its attempts are within seconds, and its error has the time for which they failed."""

    def fail(name: str) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION during HeadBucket operation")

    monkeypatch.setenv("HELIOSTAT_RETRY_BUDGET_S", "0.2")
    monkeypatch.setattr(storage, "_s3", lambda *_: SimpleNamespace(get_file_info=fail))
    with pytest.raises(StorageError, match=r"^s3://bucket/runs: storage failed .*: AWS Error NETWORK_CONNECTION"):
        Location("s3://bucket/runs").probe()
    assert caplog.messages == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has it")
@pytest.mark.parametrize("place", ["/proc/of-heliostat", "/proc/of-heliostat/runs"])
def test_a_folder_of_the_kernels_takes_no_output(place):
    """Its owner, root, may write to /proc, but can't create a file there. The error is one line, not FileNotFoundError."""
    with pytest.raises(AccessError, match=r"can't write to the folder .*\. Use another location$"):
        Location(place).require_writable()
    for write in (lambda: Location(place).write(b"x"), lambda: Location(place).create(b"x")):
        with pytest.raises(AccessError, match=rf"^{place}: can't create a file here\. Use another location$"):
            write()


@pytest.mark.parametrize("scheme", ["query", "environment"])
def test_an_unreachable_store_is_found_out_in_seconds(closed_port, no_endpoint, monkeypatch, scheme):
    """For a closed port, probe() raises StorageError with the URI within seconds, not after the minutes of an operation's
    retries."""
    uri = "s3://bucket/key"
    if scheme == "query":
        uri += f"?endpoint_override=127.0.0.1:{closed_port}&scheme=http"
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{closed_port}")
    storage._s3.cache_clear()
    start = time.monotonic()
    with pytest.raises(StorageError) as e:
        Location(uri).probe()
    storage._s3.cache_clear()
    assert time.monotonic() - start < 30
    assert str(e.value).startswith(f"{uri}: ") and "\n" not in str(e.value)
    assert isinstance(e.value.__cause__, OSError)


def test_probe_of_a_folder_that_is_not_there_yet_is_fine(tmp_path):
    """The first write creates a run's folder."""
    Location(str(tmp_path / "not" / "yet")).probe()


@pytest.fixture
def no_sleep(monkeypatch) -> list[float]:
    """Makes retries instant: waits are recorded, and the clock advances by them."""
    waits: list[float] = []
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    monkeypatch.setattr(retries.time, "monotonic", lambda: sum(waits))
    return waits


HEAD = "When reading information for key 'forbidden/access_denied' in bucket 'b': AWS Error {} during HeadObject operation: {}"
# what pyarrow says when a store does these things
FAULTS = [
    OSError(HEAD.format("UNKNOWN (HTTP status 503)", "No response body.")),
    OSError(HEAD.format("UNKNOWN (HTTP status 429)", "No response body.")),
    OSError(HEAD.format("SLOW_DOWN", "Please reduce your request rate.")),
    OSError(HEAD.format("NETWORK_CONNECTION", "curlCode: 7, Couldn't connect to server")),
    OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56, Failure when receiving data from the peer"),
    OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 18, Transferred a partial file"),
    OSError("AWS Error INTERNAL_FAILURE during GetObject operation: "),
    OSError("When uploading part for key 'it's' in bucket 'b': AWS Error NO_SUCH_UPLOAD during UploadPart operation: can't"),
    OSError(
        "AWS Error UNKNOWN (HTTP status 400) during PutObject operation: Unable to parse ExceptionName: BadDigest Message: x"
    ),
    OSError("Got the following 1 errors when deleting objects in S3 bucket 'b':\n- key 'x': Please reduce your request rate."),
    OSError(5, "Input/output error"),
    TimeoutError("timed out"),
    ConnectionResetError("reset"),
]
REFUSED = [
    PermissionError(13, "Permission denied"),
    OSError(HEAD.format("ACCESS_DENIED", "No response body.")),
    OSError("AWS Error INVALID_ACCESS_KEY_ID during ListObjectsV2 operation: The AWS Access Key Id does not exist"),
    OSError("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: "),
    OSError("AWS Error UNKNOWN (HTTP status 403) during PutObject operation: Unable to parse ExceptionName: QuotaExceeded"),
    OSError(
        "AWS Error UNKNOWN (HTTP status 400) during GetObject operation: Unable to parse ExceptionName: ExpiredToken Message: x"
    ),
    OSError("Got the following 1 errors when deleting objects in S3 bucket 'b':\n- key 'x': Access Denied"),
]
NO_BUCKET = (
    "When uploading object with key 'x' in bucket 'b': AWS Error NO_SUCH_BUCKET during PutObject operation: no such bucket"
)
HOPELESS = [
    OSError(HEAD.format("UNKNOWN (HTTP status 400)", "No response body.")),
    OSError(HEAD.format("UNKNOWN (HTTP status 301)", "No response body.")),
]


def fail_with(*errors: Exception, then: str = "done"):
    """Returns an operation that raises these errors in turn, and then has a result."""
    left = list(errors)

    def operation() -> str:
        if left:
            raise left.pop(0)
        return then

    return operation


def test_a_failing_store_is_asked_again_with_growing_waits(no_sleep):
    """For any kind of failure, the result arrives after one wait per failure."""
    assert Location("s3://b/k").attempt(fail_with(*FAULTS[:8])) == "done" and len(no_sleep) == 8
    assert sum(no_sleep[:3]) < sum(no_sleep[-3:]) and max(no_sleep) <= 12
    for error in FAULTS:
        no_sleep.clear()
        assert Location("s3://b/k").attempt(fail_with(error)) == "done" and len(no_sleep) == 1, error


@pytest.mark.parametrize("budget", [None, "5", "0", "1.5", "300"])
def test_a_store_that_fails_for_ever_is_an_error_within_the_budget(no_sleep, monkeypatch, budget):
    """StorageError has the place, the time, and the first line of the reason, before the budget is exceeded."""
    if budget is None:
        monkeypatch.delenv(retries.BUDGET, raising=False)
    else:
        monkeypatch.setenv(retries.BUDGET, budget)

    def never() -> None:
        raise OSError("AWS Error SLOW_DOWN during GetObject operation: still down\nwith details")

    with pytest.raises(
        StorageError, match=r"^s3://b/k: storage failed (for \d+ s|at the first request): AWS Error SLOW_DOWN.*: still down$"
    ) as e:
        Location("s3://b/k").attempt(never)
    assert isinstance(e.value.__cause__, OSError)
    left = float(budget or 60) - sum(no_sleep)
    assert 0 <= left < storage.BACKOFF.shortest + 0.3  # the attempts take next to no time


def test_no_attempt_begins_that_would_end_beyond_the_budget(no_sleep, monkeypatch):
    """Of attempts that take 25 s each, a minute has two, not three."""
    monkeypatch.setenv(retries.BUDGET, "60")
    begun = []

    def slow() -> None:
        begun.append(sum(no_sleep))
        no_sleep.append(25)
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match="no answer"):
        Location("s3://b/k").attempt(slow)
    assert len(begun) == 2 and sum(no_sleep) < 60


@pytest.mark.parametrize("budget", ["a minute", "-1", "nan", "inf", ""])
def test_a_budget_that_is_no_number_is_refused(monkeypatch, budget):
    """The error has the variable, its value, and the fix."""
    monkeypatch.setenv(retries.BUDGET, budget)
    with pytest.raises(ConfigError, match=f"HELIOSTAT_RETRY_BUDGET_S: '{budget}' isn't a number of seconds. Set it to 60"):
        retries.retry_budget()


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 6, 10, 23, 24, 60, 600])
def test_the_sdk_gives_up_within_half_the_budget(budget):
    """Its attempts at one request, with the longest pauses of 1, 2, ... s between them, leave time for a second operation."""
    attempts, silence = retries.patience(budget)
    assert attempts >= 1 and silence >= 1
    assert attempts * silence + 2 ** (attempts - 1) - 1 <= max(1, budget / 2)


@pytest.mark.parametrize(
    ("told", "error"),
    [
        *(("access denied. Check the credentials", error) for error in REFUSED),
        *(("the store can't do this. Check the bucket, credentials, region, and endpoint", error) for error in HOPELESS),
    ],
)
def test_requests_that_cannot_succeed_fail_at_once(no_sleep, told, error):
    """Retries can't help: one attempt, and an error with a hint."""
    with pytest.raises(StorageError, match=f"s3://b/k: {told}"):
        Location("s3://b/k").attempt(fail_with(error))
    assert no_sleep == []


def test_a_missing_bucket_is_said_to_be_missing(no_sleep, monkeypatch):
    """For any request to the bucket, at once, and not as a store that failed for 0 s."""
    with pytest.raises(StorageError, match=r"^s3://b/k: no bucket 'b'\. Create it"):
        Location("s3://b/k").attempt(fail_with(OSError(NO_BUCKET)))
    for fault in (OSError(NO_BUCKET), OSError("AWS Error RESOURCE_NOT_FOUND during HeadBucket operation: ")):
        monkeypatch.setattr(storage, "_s3", lambda *_, fault=fault: SimpleNamespace(get_file_info=lambda _: fail_with(fault)()))
        with pytest.raises(StorageError, match=r"^s3://b/k: no bucket 'b'\. Create it"):
            Location("s3://b/k").probe()
    assert no_sleep == []


@pytest.mark.parametrize("code", ["NO_SUCH_KEY", "RESOURCE_NOT_FOUND"])
def test_an_object_that_goes_missing_after_it_was_opened_is_file_not_found(no_sleep, code):
    """If it is deleted between two requests of one operation, it counts as missing."""
    with pytest.raises(FileNotFoundError, match="s3://b/k"):
        Location("s3://b/k").attempt(fail_with(OSError(f"AWS Error {code} during GetObject operation: ")))
    assert no_sleep == []


def test_errors_that_are_not_about_storage_pass_through_unchanged(no_sleep):
    """An error of the operation itself belongs to its caller: the same exception, at once."""
    for error in (DataError("bad"), ValueError("bad"), pa.ArrowInvalid("bad"), FileNotFoundError(2, "gone"), KeyError("x")):
        with pytest.raises(type(error)) as e:
            Location("s3://b/k").attempt(fail_with(error))
        assert e.value is error
    assert no_sleep == []


@pytest.mark.parametrize("codec", ["zstd", "snappy", "gzip", "lz4", "none"])
def test_damaged_content_is_never_taken_for_a_failing_store(tmp_path, no_sleep, codec):
    """For damage anywhere in a Parquet file, the reader's error passes through at once: no retry, no StorageError."""
    rng, place = random.Random(codec), Location(str(tmp_path / "a.parquet"))
    tokens = pa.array([[rng.randrange(300) for _ in range(20)] for _ in range(200)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"tokens": tokens}), place.path, compression=codec, row_group_size=50, write_page_checksum=True)
    raw, seen = place.read(), set()
    footer = int.from_bytes(raw[-8:-4], "little") + 8

    def read() -> pa.Table:
        with place.open() as f:
            return pq.ParquetFile(f, page_checksum_verification=rng.random() < 0.5).read_row_group(2, use_threads=False)

    for trial in range(60):
        damaged = bytearray(raw)
        if trial % 3:
            damaged[(rng.randrange(4, len(raw) - footer), -9 - rng.randrange(footer - 8))[trial % 2]] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(4, len(raw) - footer)
            del damaged[start : start + rng.randrange(1, 300)]
        Path(place.path).write_bytes(damaged)
        try:
            place.attempt(read)
        except (OSError, ValueError, pa.ArrowException) as e:
            seen.add(type(e))
    assert OSError in seen and no_sleep == []


def test_a_location_pickles_as_its_uri():
    """Locations are sent to Ray workers, without an open file system."""
    for uri in ("/x", "file:///x", "s3://b/k?region=eu-west-1"):
        place = Location(uri)
        _ = place.fs
        assert pickle.loads(pickle.dumps(place)) == place  # noqa: S301
        assert len(pickle.dumps(place)) < 300


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_errors_survive_the_trip_from_a_worker(kind):
    """Class, message, exit code, and the facts for the driver are the same after pickling."""
    more = len(inspect.signature(kind.__init__).parameters) - 2 if "__init__" in vars(kind) else 0  # besides self and message
    error = kind("line: fix\n  line 2", *range(more))
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (
        type(again) is kind
        and vars(again) == vars(error)
        and str(again) == "line: fix\n  line 2"
        and again.exit_code == kind.exit_code
    )


def test_bad_input_exits_with_2_a_stopped_run_with_130_and_everything_else_with_1():
    """Scripts rely on these exit codes: 2 means that a person must change something first, for example a missing place."""
    assert {e.__name__ for e in ALL_ERRORS if e.exit_code == 2} == {
        "AccessError",
        "ConfigError",
        "MissingDataError",
        "MissingExtraError",
    }
    assert {e.__name__ for e in ALL_ERRORS if e.exit_code == 130} == {"StoppedError", "LimitError"}
    assert {e.exit_code for e in ALL_ERRORS} == {1, 2, 130} and len(ALL_ERRORS) >= 8


def test_after_a_refusal_the_credentials_are_read_again():
    """The client's credentials may have expired. For this request, the rejection stays final."""
    place = Location("s3://b/k?endpoint_override=127.0.0.1:1&scheme=http")
    before = place.fs
    assert place.fs is before

    def expired() -> None:
        raise OSError("When reading 'k' in bucket 'b': AWS Error ACCESS_DENIED during GetObject operation: ExpiredToken")

    with pytest.raises(AccessError, match="access denied") as refused:
        place.attempt(expired)
    assert refused.value.place == place.uri and place.fs is not before
