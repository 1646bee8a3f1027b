"""Counts the samples of each row group that a run has trained on, and finds the steps that used them.

The functions need only data plans and manifests, not the shards.

The counts are exact. The complete windows before a step contain a prefix of every source's stream, so whole row groups of each
epoch are counted at once. Only the samples of the last window are located one by one.

In each epoch of its source, a sample is in exactly one window; the window's permutation decides its position. So `visits`
computes only the windows that contain samples of the row group, each once. In most cases, this is one window per epoch. If epochs
are smaller than windows, this is every window.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from heliostat.data.dataset import DataPlan, make_order, open_dataset
from heliostat.data.manifest import Manifest
from heliostat.data.manifest_table import by_first_use
from heliostat.data.order import Order


@dataclass(frozen=True)
class Segment:
    """Describes the steps [first, end) of a run, which used one data plan."""

    first: int
    end: int
    plan: DataPlan


def cut(plans: list[DataPlan], steps: int) -> list[Segment]:
    """Cuts a run of `steps` steps into segments, one per data plan, in the order in which the run used them."""
    ends = [*(p.begins for p in plans[1:]), steps][: len(plans)]
    return [Segment(p.begins, min(e, steps), p) for p, e in zip(plans, ends, strict=True) if p.begins < min(e, steps)]


def segment_counts(segment: Segment, manifests: list[Manifest]) -> list[np.ndarray]:
    """Counts the samples of each row group that a segment's steps used: int64 [chunks] for each source.

    A bad sample counts; the sample that replaced it doesn't. Samples that the plan skips don't count.
    """
    skipping = make_order(segment.plan, manifests)
    order = make_order(dataclasses.replace(segment.plan, skips=()), manifests)
    left_out = [at for at, _ in skipping.skips if segment.first < at < segment.end]
    total = [np.zeros(len(split.samples), np.int64) for split in order.splits]
    for first, end in itertools.pairwise(sorted({segment.first, *left_out, segment.end})):
        before, after = (counts(order, step) for step in (skipping.data_step(first), skipping.data_step(end - 1) + 1))
        for taken, a, b in zip(total, before, after, strict=True):
            taken += b - a
    return total


def left_out(segment: Segment, manifests: list[Manifest]) -> list[int]:
    """Counts the samples of each source that the plan skips within a segment."""
    skipping = make_order(segment.plan, manifests)
    order = make_order(dataclasses.replace(segment.plan, skips=()), manifests)
    before, after = (counts(order, at) for at in (skipping.data_step(segment.first), skipping.data_step(segment.end - 1) + 1))
    passed = [int(b.sum() - a.sum()) for a, b in zip(before, after, strict=True)]
    return [n - int(taken.sum()) for n, taken in zip(passed, segment_counts(segment, manifests), strict=True)]


def counts(order: Order, step: int) -> list[np.ndarray]:
    """Counts the samples of each row group before `step` of the global sequence: int64 [chunks] for each source.

    `order`: must not skip samples.
    """
    taken = [np.zeros(len(split.samples), np.int64) for split in order.splits]
    if step <= order.sections[0].first_step:
        return taken
    last = order.round_of(step - 1)
    _, begin, _ = order.window_at(last.begin)
    for source, samples in enumerate(order.before(begin)):
        epochs, rest = divmod(int(samples), int(order.epoch_samples[source]))
        train = order.splits[source].train
        chunks = order.epoch(source, epochs).chunks
        sizes = train[chunks]
        taken[source] += epochs * train
        taken[source][chunks] += np.clip(rest - (np.cumsum(sizes) - sizes), 0, sizes)
    steps = [order.step(s).ravel() for s in range(last.first_step, step)]
    located = order.locate(np.concatenate([np.arange(begin, last.begin), *steps]))
    for source, chunk_counts in enumerate(taken):
        np.add.at(chunk_counts, located.chunk[located.source == source], 1)
    return taken


def shards(manifest: Manifest, chunk_counts: np.ndarray) -> dict[str, int]:
    """Returns the count of each shard: the sum over the shard's row groups. The shards are in manifest order, without shards
    whose count is 0."""
    paths = by_first_use(manifest.chunks["path"]).chunk(0)
    sums = np.zeros(len(paths.dictionary), np.int64)
    np.add.at(sums, paths.indices.to_numpy(), chunk_counts)
    return {path: count for path, count in zip(paths.dictionary.to_pylist(), sums.tolist(), strict=True) if count}


def ranges(manifest: Manifest, seen: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Groups the shards in `seen` into ranges that are consecutive in the manifest. Yields the first and the last shard's path
    of each range."""
    run: list[str] = []
    for path in manifest.paths:
        if path in seen:
            run.append(path)
        elif run:
            yield run[0], run[-1]
            run = []
    if run:
        yield run[0], run[-1]


@dataclass(frozen=True)
class Visit:
    """Describes one use of a sample in a run.

    `step` counts from 1; `place`: the sample's index among the samples that the virtual rank has in this step.
    """

    step: int
    lane: int
    place: int
    epoch: int
    row: int


def visits(segment: Segment, source: int, chunk: int, rows: range) -> list[Visit]:
    """Finds the steps of a segment that used some rows of a source's row group, in order.

    For a bad sample, returns the step of the sample itself, not of its replacement.
    """
    order, taken = open_dataset(segment.plan).order, list[Visit]()
    train = order.splits[source].train
    begin = order.window_at(order.round_of(segment.first).begin)[1]
    end = order.window_at(order.round_of(segment.end - 1).end - 1)[2]  # complete windows: samples are permuted within them
    size, windows = int(order.epoch_samples[source]), set[tuple[int, int]]()
    epochs = range(int(order.before(begin)[source]) // size, -(-int(order.before(end)[source]) // size))
    if len(epochs) * (order.window_at(begin)[2] - begin) >= end - begin:  # on average, each window has an epoch
        windows.update(_all_windows(order, begin, end))
    else:
        for epoch in epochs:
            chunks = order.epoch(source, epoch).chunks
            at = int(np.flatnonzero(chunks == chunk)[0])
            first = epoch * size + int(train[chunks[:at]].sum())
            windows.update(_windows(order, source, first, first + int(train[chunk]), begin, end))
    for low, high in sorted(windows):
        samples = order.locate(np.arange(low, high))
        mine = (samples.source == source) & (samples.chunk == chunk)
        for i in np.flatnonzero(mine & (samples.row >= rows.start) & (samples.row < rows.stop)).tolist():
            step, lane, place = order.step_of(low + i)
            if step is not None and segment.first <= step < segment.end:
                taken.append(Visit(step + 1, lane, place, int(samples.epoch[i]), int(samples.row[i])))
    return sorted(taken, key=lambda v: (v.step, v.lane, v.place))


def _all_windows(order: Order, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of each window between the positions `begin` and `end`, which are limits of windows."""
    while begin < end:
        _, low, begin = order.window_at(begin)
        yield low, begin


def _windows(order: Order, source: int, first: int, stop: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of each window between the positions `begin` and `end` that contains samples [first, stop) of the
    source's stream."""
    while first < stop and int(order.before(end)[source]) > first:
        low, high = begin, end - 1
        while low < high:  # finds the first position after which the sequence contains more than `first` samples of the source
            middle = (low + high) // 2
            low, high = (low, middle) if int(order.before(middle + 1)[source]) > first else (middle + 1, high)
        _, begin, after = order.window_at(low)
        yield begin, after
        if after >= end:
            return
        first, begin = int(order.before(after)[source]), after
