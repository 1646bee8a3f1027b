"""Tests the tasks of a list of URLs: a host's URLs stay together, and a large host is split."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from heliostat.curation import segment
from heliostat.curation.images import sampling
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.sampled import SampledParts
from heliostat.curation.web import lists
from heliostat.storage.locations import Location
from heliostat.tasks import merging
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow


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


def spilled(folder: Path, lists_of_urls: list[list[str]]) -> tuple[Location, list[str]]:
    """Lists some URLs, and returns the folder and names of the temporary files with the rows."""
    place, names = Location(str(folder / "spill")), list[str]()
    (folder / "in").mkdir()
    for number, urls in enumerate(lists_of_urls):
        (folder / "in" / f"{number}.jsonl").write_text("\n".join(json.dumps({"url": url}) for url in urls))
        names += lists.listed(place, FilePart(f"{number}.jsonl", 0, 0), str(folder / "in"), "url", [], 1 << 20)["files"]
    return place, names


@pytest.mark.parametrize("of", [1, 3, 10])
def test_a_task_of_a_huge_host_holds_its_own_rows_alone(tmp_path, monkeypatch, of):
    """Together, the tasks have each row once, in about equal numbers."""
    held, join, counts = list[int](), pa.concat_tables, (500, 1, 1700, 2)
    place, names = spilled(tmp_path, [[f"http://a/{file}/{n}" for n in range(count)] for file, count in enumerate(counts)])
    monkeypatch.setattr(pa, "concat_tables", lambda tables: held.append(len(made := join(tables))) or made)
    whole = {"low": 0, "high": 1 << 64, "names": names, "large": 4}
    parts = [list(lists.rows(place, {**whole, "part": part, "of": of})) for part in range(of)]
    assert all(shared is (of > 1) for part in parts for _, shared in part)
    ids = [[row["id"] for row, _ in part] for part in parts]
    assert len(set(itertools.chain(*ids))) == sum(map(len, ids)) == sum(counts) and all(part == sorted(part) for part in ids)
    assert max(map(len, ids)) - min(map(len, ids)) < 0.4 * sum(counts) / of and held == list(map(len, ids))


def test_a_task_fetches_the_same_urls_with_any_memory_limit(tmp_path, monkeypatch):
    """A run that continues with another memory_limit merges other files, and uses the finished tasks. It must not lose URLs, or
    fetch URLs twice. A long list has several files, whose ids aren't in order."""
    monkeypatch.setattr(lists, "URLS", 20)
    monkeypatch.setattr(lists, "SPILLED", 20)
    monkeypatch.setattr(merging, "MANY", 10)
    urls = [f"http://{'big' if n % 2 else n % 100}.org/{n}" for n in range(600)]
    spill, rows_of = Location(str(tmp_path / "work")).join("spill"), list[dict[str, list[str]]]()
    for run_bytes in (3000, 1 << 20):
        found = planned(tmp_path, urls, 50, run_bytes)
        rows_of.append({json.dumps(task): sorted(row["id"] for row, _ in lists.rows(spill, task | also)) for task, also in found})
    assert rows_of[0] == rows_of[1] and sum(map(len, rows_of[0].values())) == len(urls)


@pytest.mark.parametrize("of", [2, 7])
def test_only_a_large_host_is_shared_and_a_task_begins_with_all_of_its_hosts(tmp_path, of):
    """A host in one task has its full rate. With one host after another, a task would be as slow as a single host."""
    urls = [f"http://{host}/{n}" for host in range(60) for n in range(100 if host == 7 else host % 5 + 1)]
    place, names = spilled(tmp_path, [urls[::2], urls[1::2]])
    whole, tasks_of = {"low": 0, "high": 1 << 64, "names": names, "large": 5, "of": of}, dict[str, set[int]]()
    for part in range(of):
        found = [(row["url"].split("/")[2], shared) for row, shared in lists.rows(place, {**whole, "part": part})]
        hosts = [host for host, _ in found]
        assert len(set(hosts[: len(set(hosts))])) == len(set(hosts)), "the first row of each host comes first"
        for host, shared in found:
            assert shared == (host == "7")
            tasks_of.setdefault(host, set()).add(part)
    assert {host: len(tasks) for host, tasks in tasks_of.items()} == {str(h): of if h == 7 else 1 for h in range(60)}


def planned(folder: Path, urls: list[str], per_list: int, run_bytes: int = 1 << 20) -> list[tuple[dict, dict]]:
    (folder / "in").mkdir(exist_ok=True)
    for number, some in enumerate(urls[at : at + per_list] for at in range(0, len(urls), per_list)):
        (folder / "in" / f"{number:03}.jsonl").write_text("\n".join(json.dumps({"url": url}) for url in some))
    flow = HereFlow(Work(Location(str(folder / "work"))))
    files = lists.listing(str(folder / "in"))
    return list(lists.plan(flow, str(folder / "in"), files, "url", [], 1 << 20, run_bytes))


def test_many_files_of_rows_are_merged_before_tasks_read_them(tmp_path, monkeypatch):
    """A task reads few files of any number of lists. The name of a task is the same with and without a merge."""
    monkeypatch.setattr(lists, "URLS", 20)
    urls = [f"http://{host}.org/{n}" for host in range(300) for n in range(3)]
    random.Random(0).shuffle(urls)
    monkeypatch.setattr(merging, "MANY", 1 << 30)
    before = planned(tmp_path, urls, 9)
    monkeypatch.setattr(merging, "MANY", 64)
    after = planned(tmp_path, urls, 9)
    assert [task for task, _ in before] == [task for task, _ in after]
    spill = Location(str(tmp_path / "work")).join("spill")
    assert {len(segment.load(spill, also["names"])) for _, also in before} == {100}
    assert {len(also["names"]) for _, also in after} == {1}
    read = [[row["url"] for task, also in found for row, _ in lists.rows(spill, task | also)] for found in (before, after)]
    assert read[0] == read[1] and sorted(read[0]) == sorted(urls)


def test_tasks_of_large_hosts_come_last_and_share_their_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "URLS", 20)
    urls = [f"http://{host}.org/{n}" for host in range(40) for n in range(90 if host in (3, 9) else 4)]
    shares = [task["of"] for task, _ in planned(tmp_path, urls, 200)]
    assert shares == sorted(shares) and {1, 5} <= set(shares)


def test_counts_of_groups_survive_a_record(tmp_path):
    counts = np.zeros(lists.GROUPS, np.int64)
    counts[[0, 5, lists.GROUPS - 1]] = 1, 1 << 40, 3
    assert np.array_equal(lists.unpacked(json.loads(json.dumps(lists.packed(counts)))), counts)
    assert len(lists.packed(counts)) < 4000


@pytest.mark.parametrize("count", [1, 5])
def test_a_sample_of_short_lists_has_a_size(count):
    """A dry run divides by the size of its sample."""
    sample = SampledParts(0.001)
    assert sampling.of_lists([InputFile(f"{number}.jsonl", 300, 0) for number in range(count)], sample)
    assert 1 < sample.of_bytes <= 1000 and sample.read_bytes > 0
