"""Tests that counting the tokens of a shard is exact, and needs the same memory for long and short documents."""

import tracemalloc

import numpy as np
import pytest
from heliostat.curation.text import tokens


@pytest.mark.parametrize("together", [1, 3, 50, 1 << 18])
def test_counts_are_those_of_all_documents(monkeypatch, together):
    monkeypatch.setattr(tokens, "TOGETHER", together)
    rng = np.random.default_rng(0)
    encoded = [rng.integers(0, 90, rng.integers(0, 30), dtype=np.int32) for _ in range(80)]
    assert tokens.counted(encoded, 100).tolist() == np.bincount(np.concatenate(encoded), minlength=100).tolist()
    assert tokens.counted([], 5).tolist() == [0] * 5


@pytest.mark.parametrize("length", [100, 40_000, 4_000_000])
def test_memory_does_not_grow_with_the_length_of_documents(length):
    encoded = [np.zeros(length, np.int32)] * (4_000_000 // length)
    tracemalloc.start()
    try:
        assert tokens.counted(encoded, 1000)[0] == 4_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20, "4 million tokens are 48 MB as int32 and int64"
