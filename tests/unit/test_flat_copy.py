"""Copies of flat slices: what one number of ranks has kept, any other finds in it, each byte once."""

from __future__ import annotations

import pytest
import torch
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint.flat_copy import FlatRange
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.errors import TrainingError

WHOLE = {
    "master.a": torch.arange(103, dtype=torch.float32),
    "exp_avg.a": torch.arange(103, dtype=torch.float32) / 7,
    "master.b": torch.arange(5, dtype=torch.bfloat16),
    "buffer.x": torch.arange(6, dtype=torch.int64).reshape(2, 3),
}


def slices(rank: int, world: int, empty: bool = False) -> dict[str, torch.Tensor]:
    """What a rank holds: its part of each flat tensor, and all of the buffer."""
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
