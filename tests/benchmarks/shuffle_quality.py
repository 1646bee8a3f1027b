"""Compares the mixing of an epoch: heliostat's order, mosaicml-streaming's py1e and py1br, a shuffle buffer, and a full shuffle.

    python -m tests.benchmarks.shuffle_quality [--window 8192] [--figure docs/benchmarks/shuffle-quality.svg]

One epoch of 64 shards with 1,024 samples. Each method mixes within as many samples as a window of heliostat: py1e and py1br in
their block size; the buffer in its size, with shards in random order, like Ray's local shuffle and webdataset. Distance: the
distance in the training order between two samples that were neighbors in a shard; a full shuffle's median is 0.29 of the epoch.
Diversity: the number of shards in a batch of 256. Orders are those of one worker and one epoch.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from heliostat.data.mixing import Shape
from heliostat.data.order import Order
from heliostat.data.split import whole

from tests.benchmarks import harness

SHARDS, SHARD, BATCH, SEED = 64, 1024, 256, 7
SAMPLES = SHARDS * SHARD
LANES = 4


def full() -> np.ndarray:
    return np.random.default_rng(SEED).permutation(SAMPLES)


def heliostat(window: int) -> np.ndarray:
    """Returns the samples of every step, by virtual rank, as they are trained on. A shard is a row group."""
    sizes = np.full(SHARDS, SHARD, dtype=np.int64)
    split = whole(sizes, np.ones(SHARDS), 0.0)
    shape = Shape(BATCH, LANES, min(64, window // BATCH), window)
    order = Order([split], [(0, [1.0])], SEED, shape)
    found = order.locate(np.concatenate([order.step(t).ravel() for t in range(SAMPLES // BATCH)]))
    return found.chunk * SHARD + found.row


def mosaic(algorithm: str, window: int) -> np.ndarray:
    from streaming.base.shuffle import get_shuffle

    return get_shuffle(algorithm, np.full(SHARDS, SHARD, dtype=np.int64), 1, SEED, 0, window)


def buffer(window: int) -> np.ndarray:
    """Simulates a reservoir: each arriving sample replaces a random one, which leaves."""
    random = np.random.default_rng(SEED)
    coming = np.concatenate([np.arange(SHARD) + SHARD * s for s in random.permutation(SHARDS)])
    held, out = coming[:window].copy(), np.empty(SAMPLES, dtype=np.int64)
    places = random.integers(0, window, SAMPLES)
    for i, sample in enumerate(coming[window:]):
        out[i] = held[places[i]]
        held[places[i]] = sample
    out[SAMPLES - window :] = random.permutation(held)
    return out


def distances(order: np.ndarray) -> np.ndarray:
    """Returns the distances in the training order between neighbors of a shard."""
    position = np.empty(SAMPLES, dtype=np.int64)
    position[order] = np.arange(SAMPLES)
    return np.abs(np.diff(position.reshape(SHARDS, SHARD), axis=1)).ravel()


def diversity(order: np.ndarray) -> np.ndarray:
    """Returns the number of different shards in every batch."""
    return np.array([len(np.unique(batch // SHARD)) for batch in order.reshape(-1, BATCH)])


def show(name: str, order: np.ndarray) -> None:
    assert np.array_equal(np.sort(order), np.arange(SAMPLES)), f"{name}: not every sample once"
    far, many = distances(order), diversity(order)
    low, middle, high = np.quantile(far, [0.05, 0.5, 0.95])
    apart = [f"{number:,.0f}" for number in (middle, far.mean(), low, high)]
    shards = f"{np.median(many):.0f}", f"{many.mean():.1f}", f"{np.quantile(many, 0.05):.0f}", many.max()
    harness.row(name, *apart, f"{(far < BATCH).mean():.1%}", *shards)


def draw(orders: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "heliostat"
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, order in orders.items():
        far, many = np.sort(distances(order)), np.sort(diversity(order))
        left.plot(far[:: len(far) // 500], np.linspace(0, 1, len(far))[:: len(far) // 500], label=name)
        right.plot(many, np.linspace(0, 1, len(many)), label=name)
    left.set(xscale="log", xlim=(1, SAMPLES), xlabel="distance in the training order, samples", ylabel="share of neighbours")
    right.set(xlim=(0, SHARDS), xlabel=f"distinct shards in a batch of {BATCH}", ylabel="share of batches")
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    options = harness.arguments(__doc__, window=8192, figure={"type": Path})
    orders = {"heliostat": heliostat(options.window)}
    if find_spec("streaming"):
        orders |= {name: mosaic(name, options.window) for name in ("py1e", "py1br")}
    else:
        print("left out: py1e, py1br (streaming is not installed)", file=sys.stderr)
    orders |= {"shuffle buffer": buffer(options.window), "full shuffle": full()}
    print(f"{SHARDS} shards of {SHARD:,} samples, mixed within {options.window:,}, batches of {BATCH}\n")
    of_batches = ("shards in a batch: median", "mean", "5 %", "most")
    harness.head("order", "distance: median", "mean", "5 %", "95 %", "below a batch", *of_batches)
    for name, order in orders.items():
        show(name, order)
    if options.figure:
        draw(orders, options.figure)


if __name__ == "__main__":
    main()
