"""Tests that a run's samples don't depend on the number of streams that deliver them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from heliostat.data import node_streams, stream
from heliostat.data.mixing import Shape
from heliostat.data.order import Order
from heliostat.data.split import growing_runs

from tests.seeds import every_seed

STEPS = 60


def drawn(seed: int) -> tuple[Order, list[str], int]:
    """Draws an order with skips and several sections, the node of each rank, and a step to start at."""
    rng = np.random.default_rng(seed)
    nodes = [f"n{node}" for node in range(int(rng.integers(1, 5))) for _ in range(int(rng.integers(1, 5)))]
    if seed % 4 == 0:
        rng.shuffle(nodes)  # ranks that do not count through node after node
    lanes, per_lane, steps_per_block = len(nodes) * int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.integers(1, 5))
    shape = Shape(lanes * per_lane, lanes, steps_per_block, per_lane * steps_per_block * int(rng.integers(1, 9)))
    splits = [growing_runs(rng.integers(1, 40, 12), np.arange(12).astype(np.uint64), 0.1) for _ in range(2)]
    mix = [(0, [1.0, 1.0]), (int(rng.integers(1, STEPS)), [1.0, 3.0])]
    skips = [(int(rng.integers(0, STEPS)), int(rng.integers(1, 30)))] if seed % 2 else []
    return Order(splits, mix, seed, shape, skips=skips), nodes, int(rng.integers(0, STEPS))


@every_seed(60)
def test_each_rank_gets_its_blocks_in_order_from_the_stream_of_its_node(seed, monkeypatch):
    order, nodes, start = drawn(seed)
    shape, count = order.shape, len(nodes)
    monkeypatch.setattr(stream, "open_dataset", lambda plan: SimpleNamespace(order=order))
    task = stream.fetch(SimpleNamespace(shape=shape), order, start, STEPS, replace=True)
    rounds = list(dict.fromkeys(order.round_of(step).block for step in range(start, STEPS)))
    grouped = node_streams.groups(nodes, node_streams.per_window(shape))
    assert sorted(rank for ranks in grouped for rank in ranks) == list(range(count))
    assert len(grouped) == 1 or all(len(ranks) >= node_streams.per_window(shape) for ranks in grouped)
    assert all(len({nodes[rank] for rank in ranks} & {nodes[rank] for rank in others}) == 0
               for ranks in grouped for others in grouped if ranks is not others)  # fmt: skip
    for ranks in grouped:
        share = dataclasses.replace(task, ranks=(tuple(ranks), count)) if len(grouped) > 1 else task
        brought = [n for index in share.indices() for n in share.numbers(order, share.window(index))]
        for place, rank in enumerate(ranks):  # as streaming_split hands them out
            assert brought[place :: len(ranks)] == [b + lane for b in rounds for lane in range(rank, shape.lanes, count)]


def test_no_window_is_read_twice_where_nodes_fill_windows():
    shape = Shape(64, 64, 2, 8)  # windows of four blocks
    whole = node_streams.groups([f"n{rank // 8}" for rank in range(64)], node_streams.per_window(shape))
    assert len(whole) == 8 and node_streams.reads(whole, shape) == 1
    odd = node_streams.groups([f"n{rank // 6}" for rank in range(60)], 4)
    assert 1 < node_streams.reads(odd, dataclasses.replace(shape, batch=60, lanes=60)) <= 2


@pytest.mark.parametrize(("nodes", "groups"), [
    (["a", "a", "b", "b"], [[0, 1, 2, 3]]),  # a window has four blocks: two streams would read each window twice
    (["a"] * 4 + ["b"] * 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (["a"] * 4 + ["b"] * 3, [[0, 1, 2, 3, 4, 5, 6]]),
    (["a", "b"] * 4, [[0, 2, 4, 6], [1, 3, 5, 7]]),
])  # fmt: skip
def test_nodes_join_until_their_ranks_take_whole_windows(nodes, groups):
    assert node_streams.groups(nodes, 4) == groups
