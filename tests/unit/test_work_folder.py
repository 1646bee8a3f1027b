"""Tests the work folder: a spill that doesn't match its name is written again, and no column of it is limited to 2 GiB."""

import importlib
import pkgutil
import time
from pathlib import Path

import heliostat.curation
import heliostat.tasks
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import making, prepare, reasons, segment
from heliostat.errors import ConfigError, DataError
from heliostat.storage import locations as storage
from heliostat.storage.locations import Location
from heliostat.tasks import flow, spill
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow, curate, left
from tests.unit.test_curation_engine import texts

STAGES = [{"stage": "length", "min_words": 90}]
PUBLISHED = (  # row groups of datasets, a chunk each
    "heliostat.curation.text.tokens",
    "heliostat.curation.pairs.making",
    "heliostat.curation.conversations.making",
    "heliostat.curation.references.computing",
)


def spilled(folder: Path) -> list[Path]:
    return sorted((folder / "spill").rglob("*.parquet"), key=lambda p: p.name)


@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_spill_is_made_again(tmp_path, size):
    """A machine that lost its power may leave a file's name without all of its bytes."""
    found, _ = curate(tmp_path, texts(), STAGES)
    cut = tmp_path / "spill" / found.runs[2].name
    whole = cut.read_bytes()
    cut.write_bytes(whole[:size])
    again, here = curate(tmp_path, texts(), STAGES)
    assert again.runs == found.runs and cut.read_bytes() == whole and 1 <= here.done["read"] <= 2


def test_a_spill_that_is_damaged_is_removed_so_that_the_next_start_makes_it_again(tmp_path):
    found, here = curate(tmp_path, texts(), STAGES)
    damaged = tmp_path / "spill" / found.runs[2].name
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:40] + bytes(len(whole) - 80) + whole[-40:])
    with pytest.raises(
        DataError, match=rf"^work: \S+{damaged.name}: was damaged, so heliostat removed this file\. Run the command again"
    ):
        left(found, here)
    assert not damaged.exists()
    again, here = curate(tmp_path, texts(), STAGES)
    assert left(again, here).keys() and damaged.read_bytes() == whole
    told = tmp_path / "spill" / segment.store(here.work.spill, {"a": "b" * 50})
    told.write_bytes(told.read_bytes()[:-3])
    with pytest.raises(DataError, match="was damaged, so heliostat removed this file"):
        segment.load(here.work.spill, str(told.relative_to(tmp_path / "spill")))


def test_a_spill_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    done, replace = list[str](), Path.replace
    monkeypatch.setattr(storage.os, "fsync", lambda number: done.append("synced"))
    monkeypatch.setattr(Path, "replace", lambda *given: (done.append("named"), replace(*given)))
    segment.store(Location(str(tmp_path)), [1])
    assert done == ["synced", "named"]


def schemas() -> list[tuple[str, pa.Schema]]:
    found = []
    for package in (heliostat.curation, heliostat.tasks):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name not in PUBLISHED and ".stages." not in info.name:
                module = importlib.import_module(info.name)
                found += [(f"{info.name}.{name}", value) for name, value in vars(module).items() if isinstance(value, pa.Schema)]
    return found


def test_no_column_of_a_spill_has_offsets_of_32_bits():
    """Tables are joined and sorted, and a column of more than 2 GiB would then fail, at every restart."""
    found = schemas()
    assert len(found) >= 10
    narrow = [f"{name}: {f.name}" for name, schema in found for f in schema if f.type in (pa.string(), pa.binary())]
    assert not narrow


def test_files_of_datasets_keep_narrow_strings_where_these_are_enough(tmp_path, monkeypatch):
    table = pa.table({"key": pa.array([2, 1], pa.uint64()), "id": pa.array(["b", "a"], pa.large_string())})
    read = pq.read_table(pa.BufferReader(spill.encode(table)))
    assert read.schema.field("id").type == pa.string() and read["id"].to_pylist() == ["a", "b"]
    monkeypatch.setattr(spill, "NARROW", 4)
    assert pq.read_table(pa.BufferReader(spill.encode(table))).schema.field("id").type == pa.large_string()


def test_the_list_of_what_was_left_out_is_written_by_a_task_for_each_range_of_hashes(tmp_path, monkeypatch):
    """A single task held every id. Readers find several files under the same name."""
    given = {f"{i:05d}": "" if i % 2 else "words that stay" for i in range(500)}
    found, here = curate(tmp_path / "work", given, [{"stage": "length", "min_words": 2}])
    out = segment.Spiller(here.work.spill, 1 << 20)
    for i in range(300):
        out.leave_out(f"read {i:03d}", segment.READ, "empty" if i % 3 else "binary", "")
    out.leave_out("poison", "1 language", "crashed", "WorkerCrashedError: died")
    names = [*found.left_out, *out.record({})["left_out"]]
    monkeypatch.setattr(reasons, "END_ROWS", 100)
    output = Location(str(tmp_path / "out"))
    flow = HereFlow(here.work)
    listed = making.listed(flow, 301, names, output)()
    assert len(listed) == 4 and flow.done["listed"] == 4
    for versions in (listed, listed[:0], making.listed(flow, 1, names, output)(), listed):
        prepare._list(output, versions)
        place = tmp_path / "out" / prepare.LISTED
        if not versions:
            assert not place.exists()
            continue
        assert place.is_dir() == (len(versions) > 1)
        rows = pq.read_table(place).to_pylist()
        assert len(rows) == 301 and {r["id"] for r in rows} >= {"read 000", "poison"}
        assert [r for r in rows if r["reason"] == "crashed"] == [
            {"id": "poison", "reason": "crashed", "detail": "WorkerCrashedError: died"}
        ]
        listed = making.listed(HereFlow(here.work, seed=2), 301, names, output)()


def test_long_columns_count_as_what_a_run_holds(tmp_path):
    columns = {id: {"page": "x" * 5000} for id in texts(100)}
    found, _ = curate(tmp_path, texts(100), [], pieces=1, memory_limit=1 << 20, columns=columns)
    assert len(found.runs) >= 4


@pytest.mark.slow
def test_ids_of_more_than_two_gib_are_listed(tmp_path):
    """Needs about 8 GB of memory."""
    out = segment.Spiller(Location(str(tmp_path / "work" / "spill")), 1 << 20)
    for i in range(2300):
        out.leave_out(f"{i:04d}" + "x" * (1 << 20), segment.READ, "empty", "")
    names = out.record({})["left_out"]
    listed = making.tasks.list_left_out(out.folder, 0, 1, str(tmp_path / "out"), names)
    assert listed["rows"] == 2300


def leave(folder: Location, gone: Path) -> dict[str, object]:
    """Writes a temporary file after the run has removed its work folder."""
    Work(Location(str(gone))).clear()
    return {"files": [spill.put(folder, b"late", ".json")]}


@pytest.mark.parametrize("late_s", [-1.0, 1000.0])
def test_a_task_that_outlives_its_run_does_not_block_the_next_run(tmp_path, monkeypatch, late_s):
    """A call that has been repeated may still run when the run ends. It leaves no file, or only files that the next run knows
    (if it was killed before it looked)."""
    monkeypatch.setattr(flow, "LATE_S", late_s)
    place = Location(str(tmp_path / "work"))
    Work(place).begin(1 << 20)
    arguments = {"gone": tmp_path / "work"}
    if late_s > 0:
        flow.execute(Work(place).of_tasks(), "run", "some", "0" * 32, leave, arguments)
    else:
        with pytest.raises(DataError, match=r"^work: \S+: the run has ended and removed this folder"):
            flow.execute(Work(place).of_tasks(), "run", "some", "0" * 32, leave, arguments)
    assert len(place.files()) == (2 if late_s > 0 else 0)
    assert Work(place).begin(1 << 20) == 1 << 20 and place.join("work.json").exists()


def outlive(folder: Location, seconds: float, gone: Path | None) -> dict[str, object]:
    """Takes some seconds, and writes a temporary file. If `gone` is a work folder, the run removes this folder meanwhile."""
    time.sleep(seconds)
    if gone is not None:
        Work(Location(str(gone))).clear()
    return {"files": [spill.put(folder, b"late", ".json")]}


def test_short_tasks_of_a_long_call_write_nothing_after_the_run(tmp_path, monkeypatch):
    """A call of many short tasks is late as a whole, so it has a copy, which may finish the run."""
    monkeypatch.setattr(flow, "LATE_S", 0.2)
    place = Location(str(tmp_path / "work"))
    Work(place).begin(1 << 20)
    tasks = [("0" * 32, {"seconds": 0.3, "gone": None}), ("1" * 32, {"seconds": 0.0, "gone": tmp_path / "work"})]
    with pytest.raises(DataError, match=r"^work: \S+: the run has ended and removed this folder"):
        flow.execute_all(Work(place).of_tasks(), "run", "some", outlive, tasks)
    assert not place.files()


@pytest.mark.parametrize("name", ["spill/notes.txt", "done/read/key.json", "done/a/b/" + "0" * 32 + ".json", "other", "spill"])
def test_a_folder_with_other_files_is_not_taken(tmp_path, name):
    Location(str(tmp_path)).join(name).write(b"mine")
    with pytest.raises(ConfigError, match="isn't a work folder of heliostat"):
        Work(Location(str(tmp_path))).begin(1 << 20)
    assert Location(str(tmp_path)).join(name).read() == b"mine"
