"""Merging spills before tasks read ranges of them: each task finds the rows that it would find in all spills, in few of them."""

import random

import numpy as np
import pyarrow as pa
import pytest
from heliostat.storage.locations import Location
from heliostat.tasks import exchange, spill
from heliostat.tasks.exchange import exchanged
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow, curate, left, left_out
from tests.unit.test_minhash import planted
from tests.unit.test_repeated_lines import make_texts
from tests.unit.test_similar_images import images


def rows(folder: Location, names: list[str], low: int, high: int) -> list[tuple[int, int]]:
    tables = [table for name in names for table in spill.read(folder, name, low, high)]
    return sorted((row["key"], row["value"]) for table in tables for row in table.to_pylist())


@pytest.mark.parametrize("seed", range(8))
def test_each_range_has_its_rows_in_few_spills(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    monkeypatch.setattr(exchange, "MANY", 100)
    flow, folder = HereFlow(Work(Location(str(tmp_path))), seed=seed), Work(Location(str(tmp_path))).spill
    draw, names = np.random.default_rng(seed), list[str]()
    for _ in range(rng.randrange(1, 60)):
        count = rng.randrange(1, 40)
        table = {"key": draw.integers(0, 1 << 64, count, np.uint64), "value": draw.integers(0, 1 << 30, count)}
        names.append(spill.write(folder, pa.table(table)))
    parts = rng.randrange(1, 50)
    ranges = [spill.share(part, parts) for part in range(parts)]
    given = list(exchanged(flow, "test", names, ranges))
    assert len(given) == parts
    for (low, high), (_, some) in zip(ranges, given, strict=True):
        assert rows(folder, some, low, high) == rows(folder, names, low, high)
    wide = int(parts**0.5)
    merges = len(names) * parts > 100 and len(names) * wide >= 2 * parts
    assert ("test-merge" in flow.done) is merges
    if merges:
        assert max(len(some) for _, some in given) <= -(-len(names) // (len(names) * wide // parts))
    again = HereFlow(Work(Location(str(tmp_path))), seed=seed + 1)
    assert list(exchanged(again, "test", names, ranges)) == given and "test-merge" not in again.done


@pytest.mark.parametrize("parts", [300, 3000, 30_000])
def test_what_is_opened_grows_with_the_power_of_one_and_a_half(tmp_path, monkeypatch, parts):
    """By arithmetic, of as many spills as parts; a merge is said to find nothing, so that none is made."""
    opened = [0]

    class Counting(HereFlow):
        def all(self, kind, function, tasks, **more):
            made = [len(task.arguments["names"]) for task in tasks]
            opened[0] += sum(made)
            return [{"merged": str(i)} for i in range(len(made))]

    names, ranges = [str(i) for i in range(parts)], [spill.share(part, parts) for part in range(parts)]
    given = exchanged(Counting(Work(Location(str(tmp_path)))), "test", names, ranges)
    opened[0] += sum(len(some) for _, some in given)
    assert opened[0] <= 2.1 * parts**1.5


TEXTS = make_texts(200)
SIMILAR = images(12)
CASES = {
    "minhash": (planted(12)[0], [{"stage": "minhash"}], {}),
    "lines": (TEXTS, [{"stage": "repeated_lines"}], {}),
    "images": (dict.fromkeys(SIMILAR, "x"), [{"stage": "similar_images"}], {"pictures": SIMILAR}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_stay_whether_spills_are_merged_or_not(tmp_path, monkeypatch, case):
    texts, stages, more = CASES[case]
    plain, here = curate(tmp_path / "plain", texts, stages, 20, 1 << 14, **more)
    monkeypatch.setattr(exchange, "MANY", 4)
    found, there = curate(tmp_path / "merged", texts, stages, 20, 1 << 14, seed=1, **more)
    assert left(found, there) == left(plain, here) != texts and left_out(found, there) == left_out(plain, here)
    assert any(kind.endswith("-merge") for kind in there.done) and not any(kind.endswith("-merge") for kind in here.done)
