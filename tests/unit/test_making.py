"""Tests making a text dataset in this process, from reading to the manifest's rows: the same in any order, and after any
interruption."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from heliostat.curation import pieces
from heliostat.curation.engine import StageEngine
from heliostat.curation.pieces import FilePart
from heliostat.curation.text import making, sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import flow
from heliostat.tasks.work import Work

from tests.unit.build_curation import KilledError
from tests.unit.build_making import STAGES, make, make_input

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stages", [[], STAGES], ids=["plain", "stages"])
def test_the_same_dataset_in_any_order_from_any_cut(tmp_path, monkeypatch, stages):
    """Tasks are shuffled and repeated, files are split differently, and the spill limit differs: the rows and metadata are the
    same."""
    make_input(tmp_path / "in")
    (first, here) = make(tmp_path, "first", stages)
    assert len(first[0]) > 8 and first[1]["documents"] > 50
    monkeypatch.setattr(pieces, "size", lambda total: 3000)
    for seed, limit in ((1, 1 << 30), (2, 40_000)):
        again, there = make(tmp_path, f"again{seed}", stages, limit, seed=seed)
        assert again == first
        assert there.done["read"] > here.done["read"] and there.done["lines"] > 3
    assert (first[1]["dropped"].get("1 minhash: near_duplicate", 0) > 5) is bool(stages)


def test_a_making_that_ends_after_any_task_goes_on(tmp_path):
    make_input(tmp_path / "in")
    whole, here = make(tmp_path, "whole", STAGES)
    total = len(here.ran)
    for most in range(0, total, 3):
        with pytest.raises(KilledError):
            make(tmp_path, "cut", STAGES, seed=most, most=1)
    made, there = make(tmp_path, "cut", STAGES)
    assert made == whole and len(there.ran) <= total - total // 3


@pytest.mark.ci
def test_shards_that_are_done_stay_right_under_another_memory_limit(tmp_path, monkeypatch):
    """A task then writes other shards than the recorded ones. The dataset has each shard once, and none is missing."""
    make_input(tmp_path / "in", 300)
    monkeypatch.setattr(pieces, "size", lambda total: 3000)  # so that the spilled runs are the same
    monkeypatch.setattr(making, "ALONE", 1)
    (tmp_path / "in" / "c.jsonl.gz").unlink()  # which is read as a whole
    limits = 160_000, 200_000  # of 10 and of 12 shards a task, and the same spilled runs
    whole, here = make(tmp_path, "whole", [], limits[0])
    _, other = make(tmp_path, "other", [], limits[1])
    for before, after, total in ((*limits, len(here.ran)), (*limits[::-1], len(other.ran))):
        name = f"from-{before}"
        with pytest.raises(KilledError):
            make(tmp_path, name, [], before, most=total - 1)
        made, there = make(tmp_path, name, [], after)
        assert made == whole and there.done["shards"] > 0


def test_an_input_that_grows_keeps_its_pieces(tmp_path):
    """Their size depends on the input's size. Kept work keeps its size until the two differ much."""
    place = Location(str(tmp_path / "work"))
    sizes = [pieces.size(n << 20) for n in (20, 40, 300, 600, 40)]
    assert sizes == [2 << 20, 4 << 20, 32 << 20, 64 << 20, 4 << 20]
    assert [Work(place).begin(size) >> 20 for size in sizes] == [2, 2, 32, 32, 32]
    Work(place).clear()
    assert not (tmp_path / "work").exists()


def test_a_folder_of_other_things_is_no_work_folder(tmp_path):
    """The folder is rejected, and nothing in it, or next to the work, is removed."""
    (tmp_path / "spill").mkdir()
    (tmp_path / "spill/mine").write_text("x")
    work = Work(Location(str(tmp_path)))
    with pytest.raises(
        ConfigError, match=r"work: .*: isn't empty, and isn't a work folder of heliostat\. Set work to another folder"
    ):
        work.begin(1)
    work.clear()
    assert (tmp_path / "spill/mine").exists()
    other = Work(Location(str(tmp_path / "work")))
    other.begin(1)
    (tmp_path / "work/beside").write_text("x")
    other.clear()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["beside"]


def test_a_page_without_extract_is_an_error_that_names_it(tmp_path):
    make_input(tmp_path / "in")
    (tmp_path / "in" / "p.html").write_text("<p>Hello")
    with pytest.raises(ConfigError, match=r"p\.html is (a page|bytes), not text\. Put"):
        make(tmp_path, "out", [{"stage": "minhash"}])


@pytest.mark.parametrize("stages", [[], [{"stage": "length", "min_words": 1}]], ids=["without stages", "with stages"])
def test_every_kind_and_codec_is_read_with_and_without_stages(tmp_path, caplog, stages):
    """The same reader reads a `.csv` or a `.bz2`. Pages need `extract`, so without stages they are dropped and counted."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("of a file")
    (folder / "b.csv").write_text("url,text\nhttp://b,of a row\nhttp://c,\n")
    (folder / "c.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "of a line"}\n{bad'))
    (folder / "d.txt.xz").write_bytes(lzma.compress(b"of a packed file"))
    (folder / "e.ndjson").write_text('{"text": "of another line"}')
    (folder / "f.py.bz2").write_bytes(bz2.compress(b"print()"))
    if not stages:
        (folder / "g.html").write_text("<p>of a page")
    (rows, meta), _ = make(tmp_path, "out", stages)
    found = {
        id for path in {row["path"] for row in rows} for id in pq.read_table(tmp_path / "out" / path)["document"].to_pylist()
    }
    assert found == {"a.txt", "b.csv#1", "c.jsonl.bz2#1", "d.txt.xz", "e.ndjson#1", "f.py.bz2"} and meta["documents"] == 6
    assert meta["dropped"] == {"empty": 1, "invalid_json": 1}
    assert ("skipping pages or web archives (1 file). To read these files, put {stage: extract}" in caplog.text) == (not stages)


def test_pages_alone_are_an_error_that_names_their_stage(tmp_path):
    (tmp_path / "a.html").write_text("<p>a")
    with pytest.raises(ConfigError, match=r"only pages or web archives \(1 file\)\. Put {stage: extract} first"):
        sources.listing(str(tmp_path))


MEASURED = """
import resource, sys, threading, time
from heliostat.curation import segment, pieces
from heliostat.curation.text import gathering, tasks
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.gathering import Together
from heliostat.storage.locations import Location
source, limit = tasks.TextSource(sys.argv[1], TextRules()), int(sys.argv[2])
list(source.read(pieces.FilePart("a.jsonl", 0, 0, 0, 1)))
folder = Location(sys.argv[1] + ".work")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
part = pieces.FilePart(sys.argv[3], 0, 0)
record = segment.over_pieces(folder, [part], source, [], limit // 8, False)
runs = [segment.SpilledRun(*r) for r in record["runs"]]
after_read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = gathering.gather(folder, runs, 0, 1 << 59, False)
print(len(runs), (after_read - before) >> 10, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("name", ["a.jsonl", *(pytest.param(name, marks=pytest.mark.ci) for name in ("b.jsonl.gz", "c.parquet"))])
def test_a_task_takes_its_share_of_memory_whatever_the_file(tmp_path, name):
    """For a file of 160 MB with a limit of 64 MiB: one task reads all of it, and gathers it into a shard of a 32nd."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    rng = random.Random(0)
    block = ["".join(rng.choices("abcdefghij klmnop", k=20_000)) for _ in range(50)]
    (tmp_path / "in/a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    rows = [f"{i} {block[i % 50]}" for i in range(8000)]
    with gzip.open(tmp_path / "in" / name, "wt", 0) if name.endswith("gz") else (tmp_path / "in" / name).open("w") as f:
        if not name.endswith("parquet"):
            f.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": rows}), tmp_path / "in" / name, row_group_size=8000)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "in"), str(64 << 20), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    runs, read, gathered = map(int, done.stdout.split())
    most = 256 if name.endswith("parquet") else 64  # more than the limit: docs/benchmarks/curation.md
    assert runs >= 19 and read <= most and gathered <= most + 36, done.stdout


class Told(flow.Flow):
    """Returns records of tasks that never ran."""

    def run(self, kind, function, tasks, cpus=1, valid=lambda record: True, pooled=False, reads=False):
        for number, task in enumerate(tasks):
            name, examples = f"{task.key[:2]}/{task.key}.parquet", {"empty": [f"{number}#1"] * 3}
            yield number, {"runs": [[name, 5000, 60 << 20]], "left_out": [f"ab/{name}"], "tally": None,
                           "reasons": {"empty": 7, "corrupt": 1}, "examples": examples, "seconds": 1.0}  # fmt: skip


TASKS = 1500


def test_the_driver_holds_little_of_each_task(tmp_path):
    """The limit is 600 bytes per task of ten files (docs/benchmarks/curation.md)."""
    tracemalloc.start()
    parts = ([FilePart(f"f/{i:06d}-{j}.txt", 6 << 20, i) for j in range(10)] for i in range(TASKS))
    engine = StageEngine(Told(Work(Location(str(tmp_path)))), TextSource("in", TextRules()), ["x"], 2 << 30)
    found = engine.curate(parts, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.runs) == TASKS and found.reasons == {"empty": 7 * TASKS, "corrupt": TASKS}
    assert peak < 600 * TASKS


def test_the_driver_forgets_the_parts_of_the_input_that_tasks_have(tmp_path):
    """A list of all parts takes 150 MB for a million files. Only the pieces that no task has are in memory."""
    pieces, left = [[FilePart(f"{i}.txt", 6 << 20, i)] for i in range(50)], list[int]()

    class Noting(Told):
        def run(self, kind, function, tasks, **more):
            for number, record in super().run(kind, function, tasks, **more):
                left.append(len(pieces))
                yield number, record

    engine = StageEngine(Noting(Work(Location(str(tmp_path)))), TextSource("in", TextRules()), ["x"], 2 << 30)
    found = engine.curate(pieces, [])
    assert left == [*range(49, -1, -1)] and len(found.runs) == 50
    assert [*found.left_out] == [f"ab/{run.name}" for run in found.runs]


@pytest.mark.parametrize("shards", [1, 4096, 4097, 40_000, 1_000_000])
@pytest.mark.parametrize("shard_bytes", [1 << 20, 60 << 20, 128_000_000, 1 << 30])
def test_a_task_writes_several_shards_only_if_they_are_small(shards, shard_bytes):
    """A task of several large shards takes minutes, and the last such tasks leave most CPUs idle."""
    each = making.shards_each(shards, making.TASK_BYTES, shard_bytes)
    assert each == 1 or (each * shard_bytes <= making.TASK_BYTES and shards > making.ALONE)
    assert -(-shards // each) <= making.ALONE or (each + 1) * shard_bytes > making.TASK_BYTES
