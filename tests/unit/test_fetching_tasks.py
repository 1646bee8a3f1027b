"""Tests the tasks of a list of URLs: a host's URLs stay together, and a large host is split."""

import itertools
import json
from collections import Counter

import pyarrow as pa
import pytest
from heliostat.curation.pieces import FilePart
from heliostat.curation.web import lists
from heliostat.storage.locations import Location


@pytest.mark.parametrize(
    "counts", [{}, {5: 1}, {1: 1500, 2: 400, 3: 200}, {0: 9000, 1: 1}, dict.fromkeys(range(10), 700), {65535: 2001}]
)
def test_groups_of_hosts_make_tasks_that_hold_each_once(counts):
    found = list(lists.cut(Counter(counts)))
    held = [sum(n for group, n in counts.items() if low <= group < high) for low, high, _ in found]
    assert sum(held) == sum(counts.values()) and all(held)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(found))
    assert all(number <= lists.URLS * of for number, (_, _, of) in zip(held, found, strict=True))
    assert all(high - low == 1 for low, high, of in found if of > 1)


@pytest.mark.parametrize("of", [1, 3, 10])
def test_a_task_of_a_huge_host_holds_its_own_rows_alone(tmp_path, monkeypatch, of):
    """Together, the tasks have each row once, in equal numbers, regardless of the files of the rows."""
    held, place, join = list[int](), Location(str(tmp_path / "spill")), pa.concat_tables
    monkeypatch.setattr(pa, "concat_tables", lambda tables: held.append(len(made := join(tables))) or made)
    names, whole = list[str](), {"low": 0, "high": 1 << 64}
    (tmp_path / "in").mkdir()
    for file, count in enumerate((5, 1, 17, 2)):
        rows = [json.dumps({"url": f"http://a/{file}/{n}"}) for n in range(count)]
        (tmp_path / "in" / f"{file}.jsonl").write_text("\n".join(rows))
        names += lists.listed(place, FilePart(f"{file}.jsonl", 0, 0), str(tmp_path / "in"), "url", [], 1 << 20)["files"]
    held.clear()
    parts = [[row["id"] for row in lists.rows(place, {**whole, "part": part, "of": of}, names)] for part in range(of)]
    assert len(set(itertools.chain(*parts))) == sum(map(len, parts)) == 25 and all(part == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and held == list(map(len, parts))
