"""Tests a failing store: through a proxy that throttles, hangs, and breaks connections, every operation succeeds or gives the
reason."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.chaos.proxy import FaultProxy, ProxyFault
from heliostat.data import manifest
from heliostat.data.index import index
from heliostat.errors import StorageError
from heliostat.storage import retries
from heliostat.storage.locations import Location
from heliostat.tasks import spill

from tests import stores

SMALL, LARGE = (np.random.default_rng(0).bytes(n) for n in (100_000, 12 << 20))  # LARGE is uploaded in parts
TOKENS = pa.array([[(i * j) % 300 for j in range(100)] for i in range(800)], pa.list_(pa.int32()))
BROKEN = {
    "throttled": ProxyFault("status", status=503, code="SlowDown"),
    "failing": ProxyFault("status", status=500, code="InternalError"),
    "silent": ProxyFault("delay", seconds=600),
    "reset": ProxyFault("reset"),
    "cut": ProxyFault("cut"),
}


@pytest.fixture(scope="module")
def bucket(s3_server: str) -> str:
    """Creates a bucket with a small object, a large one, and a Parquet file below `x`; the endpoint is the server's own."""
    root = Location(f"s3://faults/x?{stores.bucket(s3_server, 'faults')}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"tokens": TOKENS}), sink, row_group_size=100, write_page_checksum=True)
    for name, data in (("small", SMALL), ("large", LARGE), ("a.parquet", sink.getvalue().to_pybytes())):
        root.join(name).write(data)
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # it tells of every request that a fault cuts
    return s3_server


@pytest.fixture
def proxy(bucket: str) -> Iterator[FaultProxy]:
    with FaultProxy(bucket, seed=1) as running:
        yield running


@pytest.fixture
def root(proxy: FaultProxy) -> Location:
    return Location(f"s3://faults/x?endpoint_override={proxy.endpoint}&scheme=http")


def row_group(place: Location, number: int) -> list[list[int]]:
    def read() -> pa.Table:
        with place.fs.open_input_file(place.path) as f:
            return pq.ParquetFile(f, page_checksum_verification=True, pre_buffer=True).read_row_group(number)

    return place.attempt(read)["tokens"].to_pylist()


@pytest.mark.parametrize("fault", BROKEN)
def test_with_three_of_ten_requests_failing_everything_is_read_and_written_right(root, proxy, monkeypatch, fault):
    """Writes of one and of several parts, whole reads, row groups, listings, and deletes: as without faults, only slower."""
    monkeypatch.setenv(retries.BUDGET, "60")
    failing = BROKEN[fault]
    proxy.faults = (ProxyFault(failing.kind, rate=0.3, status=failing.status, code=failing.code, seconds=0.3),)

    def keep(name: str, data: bytes) -> None:
        root.join(fault, name).write(data)
        assert root.join(fault, name).read() == data

    def tokens(number: int) -> None:
        assert row_group(root.join("a.parquet"), number) == TOKENS[number * 100 : number * 100 + 100].to_pylist()

    with ThreadPoolExecutor(10) as pool:
        done = [pool.submit(tokens, number) for number in range(8)]
        done += [pool.submit(keep, "small", SMALL[::-1]), pool.submit(keep, "large", LARGE[::-1])]
    for work in done:
        work.result()
    assert {p for p, _ in root.files()} >= {"small", "large", "a.parquet", f"{fault}/small", f"{fault}/large"}
    root.join(fault).delete()
    assert not root.join(fault, "small").exists() and fault not in root.folders()
    with pytest.raises(FileNotFoundError):
        root.join(fault, "small").open()
    assert sum(proxy.injected.values()) >= 5


def test_spilled_tables_are_read_while_requests_fail(root, proxy, monkeypatch):
    """This includes footers, which the store delivers when a Parquet file is opened."""
    monkeypatch.setenv(retries.BUDGET, "12")
    name = spill.write(root.join("spill"), pa.table({"key": pa.array(range(50), pa.uint64())}))
    proxy.faults = (ProxyFault("status", rate=0.4),)
    for _ in range(15):
        assert sum(len(t) for t in spill.read(root.join("spill"), name)) == 50
    assert sum(proxy.injected.values()) > 10


def test_a_spilled_table_is_asked_for_in_few_requests(root, proxy):
    """A store answers in tens of milliseconds. 8 MiB of row groups with all columns cost one request, not one per column."""
    values = np.random.default_rng(0).integers(0, 1 << 63, (4, 800_000), np.uint64)
    name = spill.write(root.join("spill"), pa.table(dict(zip(("key", "a", "b", "c"), values, strict=True))))
    before = proxy.requests
    tables = list(spill.read(root.join("spill"), name))
    assert sum(map(len, tables)) == 800_000 and len(tables) == 4
    assert proxy.requests - before <= 4 + 1, "the footer is asked for too. The name has the size"
    before = proxy.requests
    assert sum(len(t) for t in spill.read(root.join("spill"), name, 0, spill.ALL >> 6, ["a"])) > 0
    assert proxy.requests - before <= 1 + 1


def test_a_probe_outlives_one_refused_request(root, proxy, monkeypatch):
    monkeypatch.setenv(retries.BUDGET, "60")
    proxy.faults = (ProxyFault("status", limit=1),)
    root.probe()
    assert sum(proxy.injected.values()) == 1
    proxy.faults = (ProxyFault("status"),)
    start = time.monotonic()
    with pytest.raises(StorageError, match="storage failed for"):
        root.probe()
    assert time.monotonic() - start < 30, "of a budget of 60"


OPERATIONS: dict[str, Callable[[Location], object]] = {
    "open": lambda root: root.join("small").open(),
    "read": lambda root: root.join("small").read(),
    "row group": lambda root: row_group(root.join("a.parquet"), 1),
    "write": lambda root: root.join("w").write(SMALL),
    "files": lambda root: root.files(),
    "delete": lambda root: root.join("small").delete(),
}


@pytest.mark.parametrize(
    ("fault", "operation"),
    [*((fault, "read") for fault in BROKEN), ("silent", "open"), ("silent", "write"), ("cut", "write"), ("reset", "files")],
)
def test_a_store_that_never_recovers_is_an_error_within_the_budget(root, proxy, monkeypatch, fault, operation):
    """StorageError has the place and the store's answer, after some attempts, and before the budget has passed."""
    monkeypatch.setenv(retries.BUDGET, "4")
    proxy.faults = (BROKEN[fault],)
    start = time.monotonic()
    with pytest.raises(
        StorageError, match=r"^s3://faults/x.*: storage failed (for \d s|at the first request): .*(AWS Error|endpoint URL)"
    ) as e:
        OPERATIONS[operation](root)
    assert time.monotonic() - start < 30  # a busy machine adds seconds; pyarrow alone would try for minutes
    assert "\n" not in str(e.value) and proxy.injected[BROKEN[fault]] >= (1 if "first request" in str(e.value) else 2)


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_refused_credentials_fail_at_once(root, proxy, code):
    """For every operation, the first answer is final. The error says that access was denied, and what to check."""
    proxy.faults = (ProxyFault("status", status=403, code=code),)
    for name, operation in OPERATIONS.items():
        before = proxy.requests
        with pytest.raises(StorageError, match=r"access denied\. Check the credentials and the bucket policy"):
            operation(root)
        assert proxy.requests - before <= 2, name


def test_a_row_group_whose_reading_breaks_off_is_read_again(root, proxy, monkeypatch):
    """The file opens well, then the store throttles until the SDK gives up. The whole read is repeated, and returns the
    tokens."""
    monkeypatch.setenv(retries.BUDGET, "20")
    place, started = root.join("a.parquet"), []

    def read() -> pa.Table:
        with place.open() as f:
            parquet = pq.ParquetFile(f)
            if not started:
                proxy.faults = (ProxyFault("status", limit=3), ProxyFault("reset", limit=3))
            started.append(time.monotonic())
            return parquet.read_row_group(5)

    assert place.attempt(read)["tokens"].to_pylist() == TOKENS[500:600].to_pylist()
    assert len(started) > 1 and sum(proxy.injected.values()) == 6


def test_a_hanging_answer_is_given_up_and_asked_for_again(root, proxy, monkeypatch):
    """Silence is a fault, too: the request ends after a part of the budget, not after minutes."""
    monkeypatch.setenv(retries.BUDGET, "16")
    proxy.faults = (ProxyFault("delay", seconds=600, limit=2),)
    start = time.monotonic()
    assert root.join("small").read() == SMALL
    assert 2 < time.monotonic() - start < 120


@pytest.mark.parametrize("kind", ["status", "reset", "cut"])
def test_a_write_that_fails_at_any_request_leaves_the_old_object(bucket, monkeypatch, kind):
    """For a failure of any request of an upload, readers see the old bytes; or the new ones, if only the last answer was lost."""
    monkeypatch.setenv(retries.BUDGET, "0")  # one attempt at every request

    def place(endpoint: str) -> Location:
        return Location(f"s3://faults/torn-{kind}?endpoint_override={endpoint}&scheme=http")

    place(bucket).write(b"old")
    for request in range(1, 20):
        with NthFails(bucket, ProxyFault(kind), request) as failing:
            through = place(failing.endpoint)
            try:
                through.attempt(lambda there=through: there._put(lambda out: out.write(LARGE)), budget_s=0)
            except StorageError:
                found = place(bucket).read()
                assert found == b"old" or (kind == "reset" and found == LARGE), f"request {request}: {len(found)} bytes"
            else:
                break
    assert failing.requests == request - 1 >= 4 and place(bucket).read() == LARGE


class NthFails(FaultProxy):
    """Fails only the n-th request."""

    def __init__(self, upstream: str, fault: ProxyFault, n: int) -> None:
        super().__init__(upstream)
        self.fault, self.n = fault, n

    def draw(self, path: str) -> ProxyFault | None:
        self.requests += 1
        return self.fault if self.requests == self.n else None


def test_damage_behind_a_failing_store_is_still_damage(root, proxy, monkeypatch):
    """A flipped bit, read while a third of the requests fail, gives the Parquet reader's error, never a StorageError, and no
    retry."""
    monkeypatch.setenv(retries.BUDGET, "60")
    raw = bytearray(root.join("a.parquet").read())
    raw[1000] ^= 4
    root.join("bad.parquet").write(bytes(raw))
    proxy.faults = (ProxyFault("status", rate=0.3), ProxyFault("reset", rate=0.1))
    for _ in range(3):
        with pytest.raises(OSError, match="CRC checksum verification failed"):
            row_group(root.join("bad.parquet"), 0)


def test_a_dataset_is_indexed_through_a_failing_store_as_through_a_good_one(root, proxy, monkeypatch):
    """Footers, listing, old and new manifest: the version is the same, and the version before is kept."""
    monkeypatch.setenv(retries.BUDGET, "60")
    shard = root.join("a.parquet").read()
    digests = []
    for place, faults in (
        (root.join("good"), ()),
        (root.join("bad"), (ProxyFault("status", rate=0.2), ProxyFault("cut", rate=0.2))),
    ):
        place.join("shards", "0.parquet").write(shard)
        first = manifest.write(place, manifest.read_footer(place, "shards/0.parquet", "tokens"), {"kind": "tokens"})
        for i in range(1, 6):
            place.join("shards", f"{i}.parquet").write(shard)
        proxy.faults = faults
        report = index(place)
        assert report.shards_added == 5 and manifest.read(place, first.digest).chunks.equals(first.chunks)
        digests.append((report.previous, report.digest, manifest.read(place).digest))
    assert digests[0] == digests[1] and digests[0][1] == digests[0][2] and proxy.injected


def test_a_missing_bucket_fails_at_once(root, proxy):
    """The fault isn't temporary, and the error says what to check."""
    nowhere = Location(str(root).replace("faults", "nowhere"))
    with pytest.raises(StorageError, match=r"no bucket 'nowhere'\. Create it"):
        nowhere.write(b"x")
    with pytest.raises(FileNotFoundError):
        nowhere.read()
    with pytest.raises(StorageError, match="Check the bucket"):
        Location(str(root).replace("faults", "no,bucket")).write(b"x")
    assert proxy.requests <= 4


def test_a_small_file_is_written_with_one_request(s3_server):
    """An upload in parts takes three requests or more, which most of the small files of a large input would pay."""
    stores.bucket(s3_server, "small")
    with FaultProxy(s3_server) as proxy:
        place = Location(f"s3://small/folder?endpoint_override={proxy.endpoint}&scheme=http")
        place.join("one").write(b"x" * 1000)
        assert proxy.requests == 1 and place.join("one").read() == b"x" * 1000
        before = proxy.requests
        place.join("large").write(bytes(6 << 20))
        assert proxy.requests - before >= 3 and len(place.join("large").read()) == 6 << 20
