"""Tests the counts of tokens over all shards: exact sums, of any number of shards, without reading all files in the driver."""

import base64
import zlib
from pathlib import Path

import numpy as np
import pytest
from heliostat.curation.text import token_counts
from heliostat.curation.text.making import Totals
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow

SHARD = {"documents": 1, "duplicates": 0, "bytes": 5, "cut": 0, "path": "a.parquet", "footer": "f", "file_bytes": 9}
GROUPS = {"row_groups": {"rows": [1], "tokens": [3], "bytes": [9], "place": [0], "content": ["c"]}}


def flow_in(folder: Path) -> HereFlow:
    return HereFlow(Work(Location(str(folder / "work"))))


@pytest.mark.parametrize("shards", [0, 1, 64, 65, 500])
def test_the_sum_is_exact_and_nothing_reads_many_files(tmp_path, monkeypatch, shards):
    flow, rng, total_of, most = flow_in(tmp_path), np.random.default_rng(shards), token_counts._total, list[int]()
    counts = rng.integers(0, 1 << 50, (shards, 300)) * rng.integers(0, 2, (shards, 300))
    counts[shards // 2 :][:1] = counts[:1]  # two shards with the same counts have the same file
    monkeypatch.setattr(
        token_counts, "_total", lambda folder, names, size: most.append(len(names)) or total_of(folder, names, size)
    )
    names = [token_counts.store(flow.work.spill, one) for one in counts]
    total = token_counts.summed(flow, sorted(names), 300)
    assert total.dtype == np.int64 and (total == counts.sum(0)).all() and max(most) <= token_counts.SUMMED


def test_records_of_earlier_versions_count_too(tmp_path):
    """An unfinished work folder of an earlier version has the counts in the records."""
    flow, rng = flow_in(tmp_path), np.random.default_rng(0)
    counts, totals = rng.integers(0, 99, (4, 300)), Totals(300)
    for number, one in enumerate(counts):
        old = base64.b64encode(zlib.compress(one.tobytes())).decode()
        totals.add({**SHARD, **GROUPS, "counts": token_counts.store(flow.work.spill, one) if number % 2 else old})
    total = totals.counts + token_counts.summed(flow, totals.files, 300)
    assert len(totals.files) == 2 and (total == counts.sum(0)).all()
