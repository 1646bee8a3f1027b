"""Tests a matrix that workers shard by columns: a checkpoint stores it in the order of its blocks of columns.

Any slice of it, for any other number of workers or none, is restored bit for bit, and so is an export.
"""

import json
import random

import pytest
import torch
from heliostat.checkpoint import index, layout
from heliostat.checkpoint.columns import ROWS, Columns, moves
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.loading import load
from heliostat.errors import CheckpointError
from heliostat.storage.locations import Location

from tests.unit import build_checkpoint


def _ordered(matrix: torch.Tensor, parts: int) -> torch.Tensor:
    return torch.cat([block.reshape(-1) for block in matrix.chunk(parts, 1)])


def _slices(matrix: torch.Tensor, parts: int, alike: int) -> list[FlatShard]:
    """Returns each rank's part of a matrix: its columns, and the part of them that ZeRO assigns to it."""
    found = []
    for rank in range(parts * alike):
        mine = matrix.chunk(parts, 1)[rank % parts].reshape(-1)
        per = -(-len(mine) // alike)
        start = min(rank // parts * per, len(mine))
        order = Columns(parts, matrix.shape[1]) if parts > 1 else ROWS
        found.append(FlatShard(mine[start : start + per].clone(), rank % parts * len(mine) + start, matrix.numel(), order))
    return found


@pytest.mark.parametrize("seed", range(16))
def test_any_slice_is_found_in_any_other_order(seed, tmp_path, monkeypatch):
    """Some workers save and others load, each with its columns of the matrix, some rows at a time."""
    rng = random.Random(seed)
    monkeypatch.setattr(layout, "PIECE", rng.choice([8, 64, 1024, 1 << 26]))
    matrix = torch.randn(rng.randrange(1, 20), 12 * rng.randrange(1, 4)).to(rng.choice([torch.float32, torch.bfloat16]))
    saved, loaded = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3, 4, 6])
    states = [{"w": shard, "b": torch.ones(3)} for shard in _slices(matrix, saved, rng.randrange(1, 4))]
    build_checkpoint.save(Location(str(tmp_path)), 1, states)
    found = layout.open_checkpoint(Location(str(tmp_path)), 1)
    assert found.index.format == (5 if saved > 1 else 4)
    assert torch.equal(found.read("w"), matrix.reshape(-1)) and torch.equal(torch.cat([*found.stream("w")]), matrix.reshape(-1))
    for shard in _slices(matrix, loaded, rng.randrange(1, 4)):
        target = torch.full_like(shard.local, float("nan"))
        found.read_into("w", shard.columns, shard.start, target)
        assert torch.equal(target, shard.local)


def test_what_is_read_is_little_more_than_what_is_wanted():
    """For a matrix stored whole, a worker's columns cost whole rows. For blocks, they cost only the blocks with some of its
    columns."""
    whole = [part for move in moves(ROWS, Columns(4, 8), 80, 20, 40, 1000) for part in move.parts]
    assert [(p.start, p.width, p.skip, p.columns) for p in whole] == [(0, 8, 2, 2)]  # the second worker's
    blocks = [part for move in moves(Columns(4, 8), Columns(2, 8), 80, 40, 48, 1000) for part in move.parts]
    assert [(p.start, p.width, p.columns, p.into) for p in blocks] == [(40, 2, 2, 0), (60, 2, 2, 2)]  # two rows of the last two


@pytest.mark.parametrize("columns", [[2, 5], [0, 4], [1, 4], [3, 4], [2, 0]])
def test_columns_that_no_matrix_has_are_refused(columns, tmp_path):
    target = build_checkpoint.save(Location(str(tmp_path)), 1, [{"w": s} for s in _slices(torch.ones(3, 4), 2, 1)])
    told = layout.decode((target / "checkpoint.json").read_bytes())
    told["tensors"]["w"]["columns"] = columns
    (target / "checkpoint.json").write_bytes(layout.encode(told))
    with pytest.raises(CheckpointError, match="blocks of columns in rows of"):
        layout.open_checkpoint(Location(str(tmp_path)), 1)


def test_an_order_of_other_rows_is_another_model(tmp_path):
    """It has the same number of elements, but in a matrix of another width."""
    build_checkpoint.save(Location(str(tmp_path)), 1, [{"w": s} for s in _slices(torch.ones(3, 4), 2, 1)])
    found = layout.open_checkpoint(Location(str(tmp_path)), 1)
    other = FlatShard(torch.empty(6), 0, 12, Columns(2, 6))
    with pytest.raises(CheckpointError, match="'w' in another shape"):
        load(found, {"w": other}, None)


def test_a_checkpoint_without_columns_stays_of_the_format_that_others_read(tmp_path):
    """A reader of format 4 would take blocks of columns for rows, so only checkpoints with such blocks have a format of their
    own."""
    target = build_checkpoint.save(Location(str(tmp_path)), 1, [{"w": torch.ones(3)}])
    told = json.loads((target / "checkpoint.json").read_bytes())
    assert told["format"] == 4 and "columns" not in told["tensors"]["w"]
    index.build(told, 1)
