"""Finds the steps that trained on given samples of a chunk: the way back from a place in a dataset, exact, from data plans alone.

A sample lies in one window of its source's epoch, wherever the window's permutation puts it. So the windows that touch the chunk
are laid out, one an epoch in most cases, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from heliostat.data.coverage import Segment
from heliostat.data.dataset import open_dataset
from heliostat.data.order import Order


@dataclass(frozen=True)
class Visit:
    """Describes one time that a run took a sample; `step` counts from 1."""

    step: int
    lane: int
    place: int
    epoch: int
    row: int


def visits(segment: Segment, source: int, chunk: int, rows: range) -> list[Visit]:
    """Finds when a segment's steps took these rows of a source's chunk, by step. Bad samples count as themselves."""
    order, taken = open_dataset(segment.plan).order, list[Visit]()
    train = order.splits[source].train
    begin = order.window_at(order.round_of(segment.first).begin)[1]
    end = order.window_at(order.round_of(segment.end - 1).end - 1)[2]  # whole windows: samples change their places in them
    size = int(order.epoch_samples[source])
    for epoch in range(int(order.before(begin)[source]) // size, -(-int(order.before(end)[source]) // size)):
        chunks = order.epoch(source, epoch).chunks
        at = int(np.flatnonzero(chunks == chunk)[0])
        first = epoch * size + int(train[chunks[:at]].sum())
        for low, high in _windows(order, source, first, first + int(train[chunk]), begin, end):
            samples = order.locate(np.arange(low, high))
            mine = (samples.source == source) & (samples.epoch == epoch) & (samples.chunk == chunk)
            for i in np.flatnonzero(mine & (samples.row >= rows.start) & (samples.row < rows.stop)).tolist():
                step, lane, place = order.step_of(low + i)
                if step is not None and segment.first <= step < segment.end:
                    taken.append(Visit(step + 1, lane, place, epoch, int(samples.row[i])))
    return sorted(taken, key=lambda v: (v.step, v.lane, v.place))


def _windows(order: Order, source: int, first: int, stop: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the windows in [begin, end), as positions, that bring samples [first, stop) of a source's stream."""
    while first < stop and int(order.before(end)[source]) > first:
        low, high = begin, end - 1
        while low < high:  # the first position behind which more than `first` samples have come
            middle = (low + high) // 2
            low, high = (low, middle) if int(order.before(middle + 1)[source]) > first else (middle + 1, high)
        _, begin, after = order.window_at(low)
        yield begin, after
        if after >= end:
            return
        first, begin = int(order.before(after)[source]), after
