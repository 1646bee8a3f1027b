"""Tests the parts of a stream without Ray: blocks give the same temporary files, drops, and counts as recorded tasks."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from heliostat.curation import segment, tally
from heliostat.curation.engine import Curated, StageEngine
from heliostat.curation.pieces import FilePart
from heliostat.curation.registry import parse
from heliostat.curation.segment import LEFT_OUT, SpilledRun, load
from heliostat.curation.stage import Document, Dropped
from heliostat.curation.streamed import (
    Item,
    ReadBlocks,
    ScoreBlocks,
    Streamed,
    StreamPart,
    WriteBlocks,
    packed,
    received,
    sent,
    unpacked,
)
from heliostat.curation.streaming import combined, count, taken
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.work import Work

from tests.unit.build_curation import Given, HereFlow

STAGES = [[{"stage": "length", "min_words": 4}], [{"stage": "fix_text"}], [{"stage": "length", "max_words": 40}]]
NAMES = ["read", "stages-1", "stages-2"]
PARTS = [[(number, parse(entry)) for entry in part] for number, part in enumerate(STAGES)]


def texts(count: int) -> dict[str, str]:
    rng = random.Random(0)
    return {f"d{i:04}": " ".join(f"w{rng.randrange(99)}" for _ in range(rng.randrange(1, 60))) for i in range(count)}


def engine_of(folder: Path, given: dict[str, str], run_bytes: int, every: int = 1) -> StageEngine:
    return StageEngine(HereFlow(Work(Location(str(folder)))), Given(given), ["given"], 8 * run_bytes, every)


def streamed(engine: StageEngine, item: Item, split: int, read: bool = True) -> list[dict[str, Any]]:
    """Runs one task through the parts of a stream, with blocks in any order. `split` of the later parts run in the actor."""
    workers = Streamed(engine.flow.work.spill, engine.source, engine.run_bytes, True, engine.every, None)
    parts = [StreamPart(name, part[0][0], engine._entries([s for _, s in part])) for name, part in zip(NAMES, PARTS, strict=True)]
    before, *later = parts if read else [None, *parts[1:]]
    blocks = list(ReadBlocks(workers, before)(pa.table({"id": [b"", sent(7, item)]})))
    random.Random(0).shuffle(blocks)
    scoring, writing = ScoreBlocks(workers, later[:split]), WriteBlocks(workers, later[split:])
    return [row for block in blocks for scored in scoring(block) for done in writing(scored) for row in done.to_pylist()]


def content(engine: StageEngine, curated: Curated) -> tuple[list[SpilledRun], dict[str, int], tally.Tally]:
    """Returns the temporary files of documents, the numbers of dropped documents by reason, and the counts of the stages."""
    counts = tally.merge(load(engine.flow.work.spill, name) for name in curated.tallies)
    return (
        sorted(curated.runs, key=lambda run: run.name),
        dict(curated.reasons),
        {n: counts[n] | {"seconds": 0} for n in sorted(counts)},
    )


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("run_bytes", "every"), [(1 << 12, 1), (1 << 12, 7), (1 << 24, 1), (1 << 24, 0)])
def test_a_stream_writes_the_same_files_and_counts_as_recorded_tasks(tmp_path, split, run_bytes, every):
    """This holds for one and for many blocks, wherever the actor's part ends, and for a record of all, some, or no documents."""
    given = texts(400)
    engine, piece = engine_of(tmp_path, given, run_bytes, every), [FilePart(id, len(text), 0) for id, text in given.items()]
    rows = streamed(engine, piece, split)
    assert (len(rows) == 1) is (run_bytes > 1 << 20) and {row["error"] for row in rows} == {None}
    record, stream, plain = combined(rows), Curated(), Curated()
    for part in record["records"]:
        stream.take(part)
    stream.runs = [SpilledRun(*run) for run in record["runs"]]
    plain.runs = engine._recorded(plain, PARTS, NAMES, engine._over_pieces(iter([piece]), [s for _, s in PARTS[0]], True))
    assert content(engine, stream) == content(engine, plain)
    count(counted := HereFlow(engine.flow.work), counted.done, record)
    assert counted.passed == engine.flow.passed
    listed = [sorted(spill.joined(engine.flow.work.spill, one.left_out, 0, spill.ALL, LEFT_OUT)["id"].to_pylist())
              for one in (stream, plain)]  # fmt: skip
    dropped = sum(stream.reasons.values())
    assert listed[0] == listed[1] and len(listed[0]) in {1: [dropped], 7: range(1, dropped // 3), 0: [0]}[every]
    assert all(engine.flow.work.spill.join(name).exists() for name in record["files"])


def test_a_stream_continues_after_a_comparison_without_the_documents_that_were_dropped_there(tmp_path):
    engine = engine_of(tmp_path, given := texts(50), 1 << 24)
    piece = [FilePart(id, len(text), 0) for id, text in given.items()]
    (run,) = engine._recorded(Curated(), PARTS[:1], NAMES[:1], engine._over_pieces(iter([piece]), [s for _, s in PARTS[0]], True))
    rows = pa.table({"key": pa.array([0, 1], pa.uint64()), "row": pa.array([0, 1], pa.uint32())})
    table = pa.concat_tables(spill.read(engine.flow.work.spill, run.name))
    rows = rows.set_column(0, "key", table["key"].slice(0, 2))
    decided = SpilledRun(run.name, run.rows, run.bytes, (spill.write(engine.flow.work.spill, rows),))
    record, plain = combined(streamed(engine, decided, 1, read=False)), Curated()
    plain.runs = engine._recorded(plain, PARTS[1:], NAMES[1:], engine._over_runs([decided], [s for _, s in PARTS[1]], 1))
    assert [SpilledRun(*run) for run in record["runs"]] == plain.runs and plain.runs[0].rows < run.rows


def test_an_error_ends_only_its_task_and_passes_through_the_later_parts(tmp_path):
    """Reading fails at a document that doesn't exist."""
    engine = engine_of(tmp_path, texts(5), 1 << 24)
    (row,) = streamed(engine, [FilePart("d0001", 9, 0), FilePart("missing", 9, 0)], 1)
    assert row["task"] == 7 and "missing" in row["error"] and row["records"] == "[]"


def test_tasks_and_tables_arrive_as_they_were_sent():
    run = SpilledRun("3f/a", 3, 9, ("b", "c"))
    piece = [FilePart("a", 9, 5, 2, 4, 7, "tag", "old"), FilePart("b", 1, 1)]
    assert received(sent(1, run)) == (1, run) and received(sent(2, piece)) == (2, piece)
    tables = [pa.table({"a": [1, 2]}), pa.table({"a": pa.chunked_array([[3], [4, 5]])})]
    assert unpacked(packed(tables)) == tables and unpacked(packed([])) == []


class LostQueue(list):
    """Returns its items one by one, as the queue of a stream does."""

    def get(self) -> object:
        return self.pop(0)

    def put(self, item: object) -> None:
        self.append(item)


def test_a_source_that_starts_again_sends_nothing_in_place_of_what_the_stream_has():
    """Ray ignores as many items as it already has, so none of the later tasks may be among these."""
    feed = LostQueue([(0, b"a"), (1, b"b"), (2, b"c"), (3, b"d"), (4, None)])
    first = taken(feed)
    assert [next(first), next(first)] == [b"a", b"b"]
    assert list(taken(feed)) == [b"", b"", b"c", b"d"]
    assert list(taken(feed)) == [b""] * 4, "it ends, and doesn't wait for tasks"


class Counting(Given):
    """Counts the parts that a process reads."""

    reads = 0

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        Counting.reads += 1
        return super().read(part)


def test_only_the_first_task_of_a_process_warms_up(tmp_path):
    """A warm-up in each task would read the beginning of each piece twice, and a prediction would contain the seconds of all
    warm-ups."""
    given = texts(40)
    engine = engine_of(tmp_path, given, 1 << 24)
    tasks = list(engine._over_pieces(iter([[FilePart(id, len(text), 0)] for id, text in given.items()]), [], True))
    for expected, task in zip((2, 3, 4), tasks, strict=False):
        options = {**task.arguments, "source": Counting(given), "warm": True}
        record = segment.over_pieces(engine.flow.work.spill, **options)
        assert Counting.reads == expected and record["opening"] >= 0
