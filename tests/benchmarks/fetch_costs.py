"""Measures where heliostat's fetch task and its consumer spend their CPU time, and the cost of shuffling.

    python -m tests.benchmarks.fetch_costs [--rounds 5] [--samples 131072] [--data FOLDER]

Fetches all windows of one epoch of `ingest.py`'s token rows from local disk, in this process and without Ray. Each part of the
task is timed alone (CPU seconds of all threads). Then the whole task runs with and without its permutations, which no option
turns off. Without them, every window is its row groups in file order, so the difference is the whole cost of shuffling.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from heliostat.cluster.private_ray import worker_environment
from heliostat.data import chunks, dataset, order, stream

from tests.benchmarks import harness
from tests.benchmarks.ingest_contenders import contenders, samples
from tests.benchmarks.ingest_contenders.task import Task


class Costs:
    """Sums CPU seconds of all threads, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any) -> Any:
            since = time.process_time()
            try:
                return call(*arguments)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - since

        return timing


@contextmanager
def unshuffled() -> Iterator[None]:
    """Replaces every permutation with the identity."""
    shuffled = order.permutation
    order.permutation = lambda size, *key: np.arange(size)
    try:
        yield
    finally:
        order.permutation = shuffled


def parts(task: Any, plan: Any, steps: int) -> dict[str, float]:
    """Returns the CPU seconds of one epoch, by part. Row groups are read one at a time, so that each reader's time is its own."""
    costs, readers, digests = Costs(), chunks.READERS, stream.sample_digests
    dataset.open_dataset.cache_clear()
    data: Any = dataset.open_dataset(plan)
    data.order.locate = costs.timed("find the samples", data.order.locate)
    data._chunks.read = costs.timed("read the chunks", data._chunks.read)
    data.gather = costs.timed("gather", data.gather)
    chunks.READERS, stream.sample_digests = 1, costs.timed("hash the samples", digests)
    try:
        blocks = [b for index in range(task.count) for b in costs.timed("task", fetch)(task, index)]
    finally:
        chunks.READERS, stream.sample_digests = readers, digests
    consumer = stream.LaneStream(iter(blocks), plan, data.order, 0, 1, 0)
    take = costs.timed("take the steps", consumer.next_step)
    for _ in range(steps):
        take()
    spent = costs.seconds
    spent["gather"] -= spent["read the chunks"]
    rest = spent.pop("task") - sum(v for k, v in spent.items() if k != "take the steps")
    taking = spent.pop("take the steps")
    return {**spent, "cut the blocks": rest, "take the steps": taking}


def fetch(task: Any, index: int) -> list[pa.Table]:
    return list(task({"id": np.array([index])}))


def epoch(task: Any) -> float:
    """Returns the CPU seconds of one epoch's fetch tasks."""
    dataset.open_dataset.cache_clear()
    dataset.open_dataset(task.plan)
    costs = Costs()
    for index in range(task.count):
        costs.timed("task", fetch)(task, index)
    return costs.seconds["task"]


def main() -> None:
    options = harness.arguments(__doc__, rounds=5, samples=131_072, data={"type": Path})
    with tempfile.TemporaryDirectory(prefix="fetch-") as scratch:
        folder = (options.data or Path(scratch)) / f"tokens-{options.samples}"
        samples.make("tokens", folder, options.samples, 512)
        job = Task("ours", "tokens", str(folder), None, 1, options.samples, 512, 32, 16_384, scratch)
        config, plan, sequence, _ = contenders.planned(job)
        task = stream.fetch(plan, sequence, 0, config.train.steps, replace=True)
        epoch(task)  # the files are in the page cache from here on
        rounds, shuffled, plain = [], [], []
        for _ in range(options.rounds):
            rounds.append(parts(task, plan, config.train.steps))
            shuffled.append(epoch(task))
            with unshuffled():
                plain.append(epoch(task))
    tokens = options.samples * 512
    print(f"{options.samples:,} samples of 512 tokens, windows of {plan.shape.window:,}, medians of {options.rounds} rounds\n")
    harness.head("part", "CPU ns a token", "share")
    total = sum(median(r[name] for r in rounds) for name in rounds[0])
    for name in rounds[0]:
        seconds = median(r[name] for r in rounds)
        harness.row(name, f"{seconds / tokens * 1e9:.3f}", f"{seconds / total:.1%}")
    cost = median(s / p - 1 for s, p in zip(shuffled, plain, strict=True))
    with_it, without = (median(values) / tokens * 1e9 for values in (shuffled, plain))
    print(f"\nThe fetch tasks took {with_it:.3f} ns a token shuffled and {without:.3f} not: {cost:+.1%}")


if __name__ == "__main__":
    if worker_environment(0).items() <= os.environ.items():
        main()
    else:  # memory is handed out as in Ray's workers only if the process starts so
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.benchmarks.fetch_costs", *sys.argv[1:]],
            {**os.environ, **worker_environment(0)},
        )
