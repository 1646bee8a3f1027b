"""Counts the samples of each chunk that a run has trained on: exact, from data plans alone, in time that grows with the chunks.

Whole windows of the sequence are a prefix of every source's stream, and so of its epochs' chunks; only the samples of the last
window are looked up one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from heliostat.data.dataset import DataPlan, make_order
from heliostat.data.manifest import Manifest
from heliostat.data.order import Order


@dataclass(frozen=True)
class Segment:
    """Describes steps [first, end) of a run, which followed `plan`."""

    first: int
    end: int
    plan: DataPlan


def cut(plans: list[DataPlan], steps: int) -> list[Segment]:
    """Cuts a run of `steps` steps into segments, one for each data plan that it followed, in the order in which they began."""
    ends = [*(p.begins for p in plans[1:]), steps][: len(plans)]
    return [Segment(p.begins, min(e, steps), p) for p, e in zip(plans, ends, strict=True) if p.begins < min(e, steps)]


def segment_counts(segment: Segment, manifests: list[Manifest]) -> list[np.ndarray]:
    """Counts the samples of each source's chunks that a segment's steps took, int64 [chunks] for each source.

    Bad samples count as themselves, not as their replacements; samples that the plan leaves out do not count.
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
    """Counts the samples of each source that the plan leaves out within a segment: those of the sequence that no step took."""
    skipping = make_order(segment.plan, manifests)
    order = make_order(dataclasses.replace(segment.plan, skips=()), manifests)
    before, after = (counts(order, at) for at in (skipping.data_step(segment.first), skipping.data_step(segment.end - 1) + 1))
    passed = [int(b.sum() - a.sum()) for a, b in zip(before, after, strict=True)]
    return [n - int(taken.sum()) for n, taken in zip(passed, segment_counts(segment, manifests), strict=True)]


def counts(order: Order, step: int) -> list[np.ndarray]:
    """Counts the samples of each source's chunks in the sequence's steps before `step`, for an order that leaves nothing out."""
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
    """Sums the counts of chunks by shard, in manifest order, without shards of which nothing was taken."""
    out: dict[str, int] = {}
    for path, count in zip(manifest.paths, chunk_counts.tolist(), strict=True):
        if count:
            out[path] = out.get(path, 0) + count
    return out


def ranges(manifest: Manifest, seen: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yields the shards in `seen` as ranges (first, last) of shards that are consecutive in the manifest."""
    run: list[str] = []
    for path in dict.fromkeys(manifest.paths):
        if path in seen:
            run.append(path)
        elif run:
            yield run[0], run[-1]
            run = []
    if run:
        yield run[0], run[-1]
