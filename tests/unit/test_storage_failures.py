"""Tests failures of storage: temporary ones are retried within the budget, and permanent ones are errors with a fix, at once."""

import errno
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.errors import AccessError, ConfigError, DataError, StorageError
from heliostat.storage import locations as storage
from heliostat.storage import retries
from heliostat.storage.locations import Location


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


def test_missing_files_are_file_not_found(tmp_path, no_sleep):
    """The error comes at once, without retries: a missing file is an answer, not a failure."""
    for operation in (Location(str(tmp_path / "no")).read, Location(str(tmp_path / "no")).open):
        with pytest.raises(FileNotFoundError):
            operation()
    assert no_sleep == []


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
