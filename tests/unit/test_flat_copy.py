"""Tests copies of flat slices: any number of ranks can read the copies of any other number, and a save copies the marked
moment."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint.flat_copy import ALIGNED, FlatRange, HostCopy
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.errors import TrainingError

WHOLE = {
    "master.a": torch.arange(103, dtype=torch.float32),
    "exp_avg.a": torch.arange(103, dtype=torch.float32) / 7,
    "master.b": torch.arange(5, dtype=torch.bfloat16),
    "buffer.x": torch.arange(6, dtype=torch.int64).reshape(2, 3),
}


def slices(rank: int, world: int, empty: bool = False) -> dict[str, torch.Tensor]:
    """Returns a rank's state: its part of each flat tensor, and the whole buffer."""
    found: dict[str, torch.Tensor] = {}
    for name, value in WHOLE.items():
        if name == "buffer.x":
            found[name] = torch.zeros_like(value) if empty else value
            continue
        per = -(-len(value) // world)
        start = min(rank * per, len(value))
        part = value[start : start + per]
        found[name] = FlatShard(torch.zeros_like(part) if empty else part, start, len(value))
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 2), (2, 3), (3, 2), (4, 9), (7, 4), (9, 2)])
def test_what_any_number_of_ranks_has_kept_any_other_finds(before, after):
    layouts, buffers = {}, {}
    for rank in range(before):
        state = slices(rank, before)
        layouts[rank] = flat_copy.layout(state)
        buffers[rank] = flat_copy.as_buffer(flat_copy.size(layouts[rank]), False)
        flat_copy.pack(state, layouts[rank], buffers[rank])
    for rank in range(after):
        state = slices(rank, after, empty=True)
        wanted = flat_copy.layout(state)
        buffer = flat_copy.as_buffer(flat_copy.size(wanted), False)
        for piece in flat_copy.pieces(layouts, wanted):
            source = buffers[piece.rank][piece.source : piece.source + piece.size]
            buffer[piece.target : piece.target + piece.size] = source
        flat_copy.unpack(state, wanted, buffer)
        for name, value in slices(rank, after).items():
            mine = state[name]
            same = torch.equal(mine.local, value.local) if isinstance(mine, FlatShard) else torch.equal(mine, value)
            assert same, name


def test_the_same_ranks_find_their_copy_in_one_piece():
    wanted = flat_copy.layout(slices(0, 2))
    (piece,) = flat_copy.pieces({0: wanted}, wanted)
    assert (piece.source, piece.target) == (0, 0) and piece.size >= wanted[-1].offset


def test_a_byte_that_nobody_has_is_an_error():
    wanted = [FlatRange("master.a", 0, 10, 4, 0)]
    with pytest.raises(TrainingError, match=r"lack elements 4 to 10 of 'master\.a'"):
        flat_copy.pieces({0: [FlatRange("master.a", 0, 4, 4, 0)], 1: [FlatRange("master.a", 5, 5, 4, 0)]}, wanted)


def _shards() -> dict[str, FlatShard]:
    return {
        "master.w": FlatShard(torch.arange(5, dtype=torch.float32), 10, 100),
        "frozen.w": FlatShard(torch.arange(3, dtype=torch.bfloat16), 0, 3),
        "master.empty": FlatShard(torch.empty(0), 100, 100),
        "exp_avg.w": FlatShard(torch.arange(7, dtype=torch.float64), 0, 7),
    }


def test_the_copies_are_the_slices_and_stay_as_they_were() -> None:
    host, shards, told = HostCopy(), _shards(), list[int]()
    host.mark(shards)
    copies = host.copy(shards, lambda: told.append(1))
    host.hold_back()
    host.wait()
    expected = {n: s.local.clone() for n, s in shards.items()}
    for shard in shards.values():
        shard.local.fill_(7)
    assert len(told) == len(shards) - 1, "one of them holds nothing"
    assert {*copies} == {*host.views} == {*shards}
    for name, copy in copies.items():
        assert torch.equal(copy.local, expected[name]) and torch.equal(host.views[name], expected[name])
        assert (copy.start, copy.shape, copy.dtype) == (shards[name].start, shards[name].shape, shards[name].dtype)


def test_all_copies_lie_in_one_buffer_that_is_kept_until_the_slices_change() -> None:
    host, shards = HostCopy(), _shards()
    host.copy(shards, lambda: None)
    places = {n: v.data_ptr() for n, v in host.views.items()}
    stores = {v.untyped_storage().data_ptr() for v in host.views.values()}
    assert len(stores) == 1 and all((at - next(iter(stores))) % ALIGNED == 0 for at in places.values())
    host.copy(shards, lambda: None)
    assert {n: v.data_ptr() for n, v in host.views.items()} == places
    other = {"master.w": FlatShard(torch.ones(9), 0, 9)}
    assert torch.equal(host.copy(other, lambda: None)["master.w"].local, torch.ones(9)) and {*host.views} == {"master.w"}


def test_a_copy_leaves_the_interpreter_to_others() -> None:
    """While a thread copies 256 MB, another thread never waits as long as the copy takes."""
    host = HostCopy()
    shards = {f"master.{i}": FlatShard(torch.ones(32_000_000), 0, 32_000_000) for i in range(2)}
    host.copy(shards, lambda: None)  # the memory is there
    thread = threading.Thread(target=lambda: host.copy(shards, lambda: None))
    began, turns = time.perf_counter(), 0
    thread.start()
    while thread.is_alive():
        turns += 1
        time.sleep(0)
    assert turns > 20, (turns, time.perf_counter() - began)
