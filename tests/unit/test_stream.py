"""Tests the worker's end of the stream: an early start doesn't change the stream."""

import itertools
import threading

import pytest
from heliostat.data.stream import begun


def test_what_was_begun_early_is_the_whole_sequence_in_order():
    assert list(begun(iter(range(5)))) == list(range(5))


def test_the_first_is_fetched_before_anybody_asks_for_it():
    fetched = threading.Event()

    def source():
        fetched.set()
        yield from itertools.count()

    later = begun(source())
    assert fetched.wait(60)
    assert list(itertools.islice(later, 3)) == [0, 1, 2]


def test_what_went_wrong_early_is_raised_where_the_first_is_due():
    def source():
        raise OSError("no such shard")
        yield

    later = begun(source())
    with pytest.raises(OSError, match="no such shard"):
        next(later)
