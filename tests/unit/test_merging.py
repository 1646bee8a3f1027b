"""Tests merging runs before shards are read, and spills before documents are compared: each task reads the same rows from few
files."""

import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from heliostat.curation import reasons, segment
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import merging, spill
from heliostat.tasks.merging import ShardRange, exchanged, merged
from heliostat.tasks.work import Work, key

from tests.unit.build_curation import HereFlow, curate, left, left_out
from tests.unit.build_making import STAGES, make, make_input
from tests.unit.test_minhash import planted
from tests.unit.test_repeated_lines import make_texts
from tests.unit.test_similar_images import images

pytestmark = pytest.mark.ci


def bounds(shards: int):
    return lambda first, stop: (spill.share(first, shards)[0], spill.share(stop - 1, shards)[1])


def run_of(folder: Location, seed: int, rows: int, size: int, decided: bool) -> SpilledRun:
    """Spills a run of random keys, with some dropped rows on request."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 1 << 64, rows, np.uint64)
    columns = {"key": keys, "row": range(rows), "hash": [int(k).to_bytes(8, "big") * 4 for k in keys],
               "id": [f"{seed}-{i}" for i in range(rows)], "bytes": [size] * rows, "columns": [None] * rows,
               "text": ["x" * size] * rows}  # fmt: skip
    table = pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in segment.RUN], schema=segment.RUN)
    told: tuple[str, ...] = ()
    if decided:
        gone = table.select(["key", "row"]).slice(0, rows // 5)
        told = (spill.write(folder, gone, ("row",)),)
    return SpilledRun(spill.write(folder, table, ("id",)), rows, rows * size, told)


def ids(folder: Location, runs: list[SpilledRun], low: int = 0, high: int = spill.ALL) -> list[str]:
    return sorted(id for run in runs for table in survivors(folder, run, low, high) for id in table["id"].to_pylist())


SEEDS = [*range(3), *(pytest.param(seed, marks=pytest.mark.ci) for seed in range(3, 12))]


def test_the_tasks_of_a_merge_read_each_byte_once(tmp_path):
    """Together, they have the bytes of all runs. The number of tasks is that of the runs, so each is made when it starts."""
    runs = [SpilledRun(f"00/{i:032}-10.parquet", 10, 50 * spill.GROUP_BYTES) for i in range(40)]
    whole, most = ShardRange(0, 5000, runs), 100 * spill.GROUP_BYTES
    cut = list(merging.divided(whole, most))
    tasks = list(merging._merges(HereFlow(Work(Location(str(tmp_path)))), cut, bounds(5000), most))
    assert sum(task.bytes for task in tasks) == pytest.approx(sum(run.bytes for run in runs), rel=0.01)
    assert max(task.bytes for task in tasks) <= 1.1 * most
    assert len({id(task.shared["runs"]) for task in tasks}) == len(tasks) // len(cut) < len(tasks), "each list is sent once"
    lists = [id(task.shared["runs"]) for task in tasks]
    assert sum(a != b for a, b in pairwise(lists)) + 1 == len(set(lists)), "one call can run several tasks with the same list"
    for task in tasks[:: len(tasks) // 5]:  # records of earlier versions have this key
        named = [[run.name, run.decided] for run in task.shared["runs"]]
        assert task.key == key("merge", named, task.arguments["low"], task.arguments["high"], most)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_document_is_in_the_runs_of_its_range_once(tmp_path, monkeypatch, seed):
    """For any number of runs and shards and any run size, a shard's range holds the same documents as before."""
    rng = random.Random(seed)
    monkeypatch.setattr(merging, "MANY", rng.choice([1, 20]))
    monkeypatch.setattr(merging, "LEAST", rng.choice([200, 2000]))
    monkeypatch.setattr(spill, "GROUP_BYTES", rng.choice([300, 1500]))
    flow, shards = HereFlow(Work(Location(str(tmp_path))), seed=seed), rng.randrange(2, 30)
    folder = flow.work.spill
    runs = [run_of(folder, i, rng.randrange(1, 60), rng.randrange(1, 80), i % 3 == 1) for i in range(rng.randrange(2, 25))]
    most = rng.choice([3000, 20_000])
    found = merged(flow, runs, shards, bounds(shards), most)
    assert [one.first for one in found] == [0, *(one.stop for one in found[:-1])] and found[-1].stop == shards
    assert ("merge" in flow.done) is merging.thin(ShardRange(0, shards, runs)) and not any(map(merging.thin, found))
    bytes = sum(run.bytes for run in runs)
    assert (merging.passes(len(runs), bytes, shards, most) > 0) is ("merge" in flow.done), "as the dry run foresees it"
    for one in found:
        for shard in range(one.first, one.stop):
            low, high = bounds(shards)(shard, shard + 1)
            assert ids(folder, one.runs, low, high) == ids(folder, runs, low, high)
        assert all(not run.decided and run.bytes <= 3 * most for run in one.runs if len(found) > 1)
    again = HereFlow(Work(flow.work.location), seed=seed + 1)
    assert merged(again, runs, shards, bounds(shards), most) == found and "merge" not in again.done


def test_few_runs_and_large_parts_are_read_as_they_are(tmp_path):
    runs = [SpilledRun(str(i), 10, 1 << 20) for i in range(100)]
    for some, shards in ((runs[:40], 100), ([SpilledRun(r.name, 10, 1 << 30) for r in runs], 1000)):
        assert merged(HereFlow(Work(Location(str(tmp_path)))), some, shards, bounds(shards), 1 << 25) == [
            ShardRange(0, shards, some)
        ]


@pytest.mark.parametrize("exponent", range(28, 52, 3))
def test_a_web_is_merged_four_times_at_most(exponent):
    """By arithmetic, for 256 MB to 500 TB in runs of 32 MiB and shards of 64 MiB. Each pass costs its bytes."""
    total = 1 << exponent
    times = merging.passes(total >> 25, total, total >> 26, 1 << 25)
    assert times <= 4 and (times > 0) is (total > 1 << 34), "parts of 16 GB are LEAST"


@pytest.mark.parametrize(("runs", "mean", "shards", "times"), [
    (460_000, 195e6, 246_802, 2), (46_000, 195e6, 24_680, 1), (825_520, 52.6e6, 339_309, 2), (82_552, 52.6e6, 33_931, 1),
    (8_255, 52.6e6, 3_393, 1)])  # fmt: skip
def test_a_further_pass_runs_if_it_saves_more_reads_than_its_bytes_are_worth(runs, mean, shards, times):
    """230 TB of images had 394 million reads in one pass, and 12,535 requests per second to a prefix. Two passes and the shards
    have 70 million. For 23 TB of images, and for 1 to 10 TB of text, a second pass would take longer than the reads it saves."""
    assert merging.passes(runs, runs * mean, shards, 1 << 28) == times
    assert reads(runs, runs * mean, shards, 1 << 28, merging._divided(runs, shards, mean, 1 << 28, merging.MANY)[0]) < 85e6


def test_files_without_bytes_have_merges_too():
    """Files of empty documents have no bytes. The rule for further passes must end for them as well."""
    assert merging.passes(100, 0, 100, 1 << 20) == 1


@pytest.mark.parametrize(("runs", "mean", "shards"), [(22_824, 4_559_473, 1_550), (31_184, 50_730_346, 23_573)])
def test_a_pass_with_few_reads_after_it_is_the_last(runs, mean, shards):
    """Of 0.1 and 1.6 TB of spills, by arithmetic. A pass that prepares another one makes larger ranges. Without the other one,
    all passes and tasks had 1.8 and 2.8 times as many reads."""
    many, most_files = merging.MANY_RANGES, merging.MOST_SPILLS
    chosen = merging._divided(runs, shards, mean, 1 << 26, many, most_files)[0]
    least = reads(runs, runs * mean, shards, 1 << 26, chosen, many, most_files)
    for parts in (chosen // 4, chosen // 2, 2 * chosen, 4 * chosen):
        assert least < 1.01 * reads(runs, runs * mean, shards, 1 << 26, parts, many, most_files)


def reads(runs: int, bytes: float, shards: int, most: int, parts: int, many: int = merging.MANY,
          most_files: int = merging.MOST_FILES) -> float:  # fmt: skip
    """Counts the reads of all passes and of the shards, by arithmetic, if the first pass divides a range into `parts` parts."""
    count, ranges = 0.0, 1
    while merging._thin(runs, shards, bytes / runs / shards, many):
        parts = parts if ranges == 1 else merging._divided(runs, shards, bytes / runs, most, many, most_files)[0]
        size = min(most_files, max(2, int(most * parts / (bytes / runs))))
        count += runs * parts * ranges
        runs, bytes, shards, ranges = -(-runs // size), bytes / parts, -(-shards // parts), ranges * parts
    return count + runs * shards * ranges


@pytest.mark.parametrize(
    ("runs", "mean", "shards"), [(825_520, 52.6e6, 339_309), (82_552, 52.6e6, 33_931), (460_000, 195e6, 246_802)]
)
def test_a_merge_has_the_number_of_parts_with_the_fewest_reads(runs, mean, shards):
    """For 100 TB and 10 TB of text, and for 230 TB of images: half or twice as many parts need more reads."""
    most = 256 << 20
    chosen = merging._divided(runs, shards, mean, most, merging.MANY)[0]
    least = reads(runs, runs * mean, shards, most, chosen)
    for parts in (chosen // 2, 3 * chosen // 4, 4 * chosen // 3, 2 * chosen):
        assert least < 1.01 * reads(runs, runs * mean, shards, most, parts)


def test_the_dataset_and_its_record_are_the_same_with_merges(tmp_path, monkeypatch):
    """Merges runs before shards, spills before they are compared, and spills before the record is sorted."""
    make_input(tmp_path / "in")
    monkeypatch.setattr(reasons, "END_ROWS", 20)
    first, plain = make(tmp_path, "first", STAGES)
    monkeypatch.setattr(merging, "MANY", 2)
    monkeypatch.setattr(merging, "MANY_RANGES", 2)
    again, there = make(tmp_path, "again", STAGES, 40_000, seed=3)
    assert again == first and not any("merge" in kind for kind in plain.done)
    assert there.done["merge"] > 3 and there.done["ends-merge"] > 3


# spills that documents are compared by --------------------------------------------------------------------------------


def rows(folder: Location, names: list[str], low: int, high: int) -> list[tuple[int, int]]:
    tables = [table for name in names for table in spill.read(folder, name, low, high)]
    return sorted((row["key"], row["value"]) for table in tables for row in table.to_pylist())


@pytest.mark.parametrize("seed", SEEDS)
def test_each_range_has_its_rows_in_few_spills(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(merging, "MANY_RANGES", 100)
    flow, folder = HereFlow(Work(Location(str(tmp_path))), seed=seed), Work(Location(str(tmp_path))).spill
    draw, names = np.random.default_rng(seed), list[str]()
    for _ in range(rng.randrange(1, 60)):
        count = rng.randrange(1, 40)
        table = {"key": draw.integers(0, 1 << 64, count, np.uint64), "value": draw.integers(0, 1 << 30, count)}
        names.append(spill.write(folder, pa.table(table)))
    parts, memory = rng.randrange(1, 50), rng.choice([0, 1 << 16])
    ranges = [spill.share(part, parts) for part in range(parts)]
    flow.memory = memory
    given = list(exchanged(flow, "test", names, ranges))
    assert len(given) == parts
    for (low, high), (_, some, _) in zip(ranges, given, strict=True):
        assert rows(folder, some, low, high) == rows(folder, names, low, high)
    merges = parts > 1 and len(names) * parts > 100
    assert ("test-merge" in flow.done) is merges
    again = HereFlow(Work(Location(str(tmp_path))), seed=seed + 1, memory=memory)
    assert list(exchanged(again, "test", names, ranges)) == given and "test-merge" not in again.done


@pytest.mark.parametrize("files", [10_000, 40_000, pytest.param(400_000, marks=pytest.mark.ci)])
def test_the_number_of_reads_grows_with_the_bytes(tmp_path, monkeypatch, files):
    """By arithmetic, for files of 2 MB and ranges of 20 MB, as the record of documents has. The simulated merges write no
    files. Without merges, 400,000 files would have 16 billion reads: 40,000 of each file."""
    reads, passes, widths = [0], [0], dict[str, float]()

    class Counting(HereFlow):
        def taken(self, kind, function, tasks, take, **more):
            passes[0] += 1
            return [take(self.record(task.arguments, task.shared["runs"], task.key)) for task in tasks]

        def record(self, arguments, runs, key):
            share = (arguments["high"] - arguments["low"]) / spill.ALL
            assert len(runs) <= merging.MOST_SPILLS
            reads[0] += len(runs)
            width = widths.get(runs[0].name, 1.0)
            size = int(sum(run.bytes for run in runs) * share / width)
            name = f"{key[:2]}/{key[:32]}-{size}.parquet"
            widths[name] = share
            return {"runs": [(name, 0, size)]}

    names = [f"00/{number:032x}-2000000.parquet" for number in range(files)]
    parts = files // 10
    ranges = [spill.share(part, parts) for part in range(parts)]
    flow = Counting(Work(Location(str(tmp_path))), memory=2 << 30)
    given = [len(some) for _, some, _ in exchanged(flow, "test", names, ranges)]
    assert passes[0] <= 2 and len(given) == parts
    assert (reads[0] + sum(given)) / files < 18


TEXTS = make_texts(120)
SIMILAR = images(8)
CASES = {
    "minhash": (planted(8)[0], [{"stage": "minhash"}], {}),
    "lines": (TEXTS, [{"stage": "repeated_lines"}], {}),
    "images": (dict.fromkeys(SIMILAR, "x"), [{"stage": "similar_images"}], {"pictures": SIMILAR}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_stay_whether_spills_are_merged_or_not(tmp_path, monkeypatch, case):
    texts, stages, more = CASES[case]
    plain, here = curate(tmp_path / "plain", texts, stages, 12, 1 << 14, **more)
    monkeypatch.setattr(merging, "MANY_RANGES", 4)
    found, there = curate(tmp_path / "merged", texts, stages, 12, 1 << 14, seed=1, **more)
    assert left(found, there) == left(plain, here) != texts and left_out(found, there) == left_out(plain, here)
    assert any(kind.endswith("-merge") for kind in there.done) and not any(kind.endswith("-merge") for kind in here.done)
