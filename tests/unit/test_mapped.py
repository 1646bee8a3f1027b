"""Tests that all processes of a machine share large tables, in files that no other user can write."""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from heliostat.data import manifest, mapped
from heliostat.data.dataset import DataPlan, Dataset
from heliostat.data.mixing import Shape
from heliostat.storage.locations import Location
from heliostat.validation import check

from tests.golden.data import tokens
from tests.unit.build_job import job
from tests.unit.test_dataset import make_dataset, make_plan
from tests.unit.test_order import rows

MILLION = 1_000_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of the files, and treats every table as large."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mapped, "LARGE", 1)
    return tmp_path / f"heliostat-tables-{os.getuid()}"


def test_a_dataset_in_shared_files_gives_the_samples_of_one_in_memory(folder: Path, tmp_path: Path, monkeypatch):
    """The sequence and the held-out samples are the same, in this process and the next one, also in version 1."""
    for version in (1, 2):
        plan = dataclasses.replace(make_plan(make_dataset(tmp_path / f"{version}", version), held=0.3), version=version)
        made, again = Dataset(plan), Dataset(plan)
        files = {f: f.stat().st_ino for f in folder.glob("*.arrow")}
        assert len(files) >= 2 and folder.stat().st_mode & 0o777 == 0o700
        monkeypatch.setattr(mapped, "LARGE", MILLION)
        own = Dataset(plan)
        monkeypatch.setattr(mapped, "LARGE", 1)
        everything = np.arange(3 * int(own.order.epoch_samples.sum()))
        for data in (made, again):
            assert np.array_equal(rows(data.order.locate(everything)), rows(own.order.locate(everything)))
            assert np.array_equal(rows(data.order.held_out(99)), rows(own.order.held_out(99)))
            assert data.sources[0].chunks.equals(own.sources[0].chunks) and data.sources[0].meta == own.sources[0].meta
            assert np.array_equal(data.read(data.order.held_out(9)), own.read(own.order.held_out(9)))
        assert all(f.stat().st_ino == inode for f, inode in files.items()), "it was written again"


def test_of_processes_that_want_a_table_at_once_one_makes_it(folder: Path, tmp_path: Path):
    calls = tmp_path / "calls"

    def build() -> pa.Table:
        with calls.open("a") as f:
            f.write("x")
        time.sleep(0.2)
        return pa.table({"a": np.arange(1000)})

    def process() -> None:
        assert mapped.table(["k", 1], build)["a"].to_pylist() == list(range(1000))

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=process) for _ in range(6)]
    for p in started:
        p.start()
    for p in started:
        p.join(60)
    assert [p.exitcode for p in started] == [0] * 6 and calls.read_text() == "x"
    mapped.table(["k", 2], build)
    assert calls.read_text() == "xx"


@pytest.mark.parametrize("fault", ["open", "file", "damaged"])
def test_a_folder_that_others_may_write_and_a_damaged_file_are_not_trusted(folder: Path, fault: str, caplog):
    """Each process then keeps its own table, and logs this. A damaged file is written again."""
    wanted = pa.table({"a": [1, 2, 3]})
    if fault == "open":
        folder.mkdir()
        folder.chmod(0o777)
    elif fault == "file":
        folder.write_text("in the way")
    else:
        mapped.table("k", lambda: wanted)
        (file,) = folder.glob("*.arrow")
        file.write_bytes(file.read_bytes()[:40])
    assert mapped.table("k", lambda: wanted).equals(wanted)
    assert ("can't share a table in this folder" in caplog.text) == (fault != "damaged")
    if fault == "damaged":
        assert mapped._open(file).equals(wanted)


def test_files_that_are_no_longer_used_are_deleted(folder: Path):
    mapped.table("old", lambda: pa.table({"a": [1]}))
    old = {*folder.iterdir()}
    for file in old:
        os.utime(file, (0, 0))
    mapped.table("new", lambda: pa.table({"a": [2]}))
    assert not old & {*folder.iterdir()} and len([*folder.glob("*.arrow")]) == 1


CHUNKS = 200_000


def many_chunks(place: Path, meta: dict[str, object]) -> manifest.Manifest:
    """Writes a manifest with so many row groups, without shards."""
    numbers = np.arange(CHUNKS)
    table = pa.table(
        {
            "path": [f"shards/{n // 30:05d}.parquet" for n in numbers],
            "row_group": pa.array(numbers % 30, pa.int32()),
            "rows": numbers + 1,
            "tokens": numbers % 1000 + 5000,
            "bytes": numbers,
            "file_bytes": numbers // 30,
            "footer": [f"{n // 30:032x}" for n in numbers],
            "place": np.sort(np.random.default_rng(0).integers(0, manifest.PLACES, CHUNKS))[::-1],
        }
    )
    return manifest.write(Location(str(place)), table, {"kind": "tokens", **meta})


def test_a_process_holds_a_few_bytes_a_chunk(folder: Path, tmp_path: Path):
    """300 bytes per row group would be 7 GB for 25 million, in each worker and fetch process."""
    source = many_chunks(tmp_path / "a", {})
    plan = DataPlan((str(source.location),), (source.digest,), ((0, (1.0,)),), (None,), 64, 5, 0.01, Shape(64, 4, 2, 1024))
    Dataset(plan).order.locate(np.arange(100))  # makes the files
    del source
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    data = Dataset(plan)
    data.order.locate(np.arange(10**6, 10**6 + 100))
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert held < 6 * CHUNKS and len(data.sources[0].chunks) == CHUNKS


def test_a_checked_job_holds_a_few_bytes_a_chunk(folder: Path, tmp_path: Path):
    """A run's driver keeps the checked job during the whole run. 200 bytes per row group would be 5 GB for 25 million."""
    tokens(tmp_path / "a")
    small = manifest.read(Location(str(tmp_path / "a")))
    many_chunks(tmp_path / "a", small.meta)
    given = job(**{"data.sources": [{"path": str(tmp_path / "a")}]})
    before = pa.total_allocated_bytes()
    checked = check.check(given)
    assert pa.total_allocated_bytes() - before < 6 * CHUNKS and len(checked.manifests[0].chunks) == CHUNKS


# in a process that has done nothing else: what a table takes that is read, and what one leaves that is shared
MEASURE = """
import re, sys
import pyarrow as pa
from heliostat.data import manifest, mapped
from heliostat.storage.locations import Location

def private():
    return int(re.findall(r"^Anonymous: +([0-9]+) kB", open("/proc/self/smaps_rollup").read(), re.MULTILINE)[0]) * 1024

small, large = map(Location, sys.argv[1:])
mapped.LARGE = 1
pa.set_cpu_count(1)  # each thread of Arrow's keeps some memory, however large the table
pa.set_io_thread_count(1)
manifest.share(lambda: manifest.read(small))  # imports what reads
before = private()
own = manifest.read(large)
taken = private() - before
del own
shared = manifest.share(lambda: manifest.read(large))
print(len(shared.chunks), taken, private() - before)
"""


def test_what_a_shared_table_took_goes_back_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Arrow keeps freed memory for later use. A driver with 25 million row groups would keep 5 GB without using it."""
    many_chunks(tmp_path / "large", {})
    tokens(tmp_path / "small")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    measured = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    rows, taken, left = map(int, measured.stdout.split())
    assert rows == CHUNKS and taken > 50 * CHUNKS and left < taken / 2
