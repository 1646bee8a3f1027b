"""Tests the places of a checkpoint's elements: the merged plans of all ranks have every element once, and find it again."""

import dataclasses
import itertools
import random

import pytest
import torch
from heliostat.checkpoint import agreement, index, placement, writing
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.placement import Chunk, Shard, Tensor, WrittenPart
from heliostat.errors import CheckpointError, DataError
from heliostat.plan import zero_layout
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

ROUNDS = 40


def _shapes(rng: random.Random) -> dict[str, tuple[int, ...]]:
    return {f"p{i}": tuple(rng.randrange(1, 40) for _ in range(rng.randrange(1, 3))) for i in range(rng.randrange(1, 9))}


def _states(rng: random.Random, world: int) -> list[dict[str, torch.Tensor]]:
    """Returns what the ranks of a random model at a random stage hold: their slices, some of them empty, and buffers that all
    ranks hold."""
    shapes, stage = _shapes(rng), rng.randrange(4)
    owned = zero_layout.slices(shapes, stage, world)
    sizes = {n: int(torch.Size(s).numel()) for n, s in shapes.items()}
    buffers = {f"buffer.{i}": torch.zeros([3] * rng.randrange(3)) for i in range(rng.randrange(4))}
    states: list[dict[str, torch.Tensor]] = []
    for mine in owned:
        held = {name: (start, numel) for name, start, numel in mine}
        every = {n: (sizes[n], 0) for n in sizes} if rng.random() < 0.5 else {}  # stage 3 has empty slices
        state: dict[str, torch.Tensor] = {
            n: FlatShard(torch.zeros(numel), start, sizes[n]) for n, (start, numel) in (every | held).items()
        }
        states.append(state | buffers)
    return states


def _part(rank: int, tensors: dict[str, torch.Tensor]) -> WrittenPart:
    return writing.part(Shard(f"{rank}", 0), tensors) if tensors else WrittenPart([], {})


def _up(parts: list[WrittenPart]) -> WrittenPart:
    """Merges like the tree: each rank adds its branches in order."""
    for rank in reversed(range(len(parts))):
        for child in agreement.children(rank, len(parts)):
            parts[rank] = placement.merge(parts[rank], parts[child])
    return parts[0]


class Planned(FlatShard):
    """Implements the protocol with which torch.distributed.checkpoint plans a tensor of several ranks."""

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        chunk = ChunkStorageMetadata(torch.Size([self.start]), self.local.shape)
        data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), torch.Size([self.shape[0]]))
        made = WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
        return [made] if self.local.numel() else []

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:  # type: ignore[override]
        return args[0]  # of detach


def _planned_by_torch(states: list[dict[str, torch.Tensor]]) -> set[tuple[str, int, int]]:
    """Plans with torch.distributed.checkpoint, which gathers the plans of all ranks, as heliostat did up to format 3."""
    planner, plans = DefaultSavePlanner(), []
    for rank, mine in reversed(list(enumerate(states))):  # the planner of rank 0, which plans for all, is set up last
        state = {n: Planned(t.local, t.start, t.shape[0]) if isinstance(t, FlatShard) else t for n, t in mine.items()}
        planner.set_up_planner(state, None, rank == 0)
        plans.insert(0, planner.create_local_plan())
    items = [item for plan in planner.create_global_plan(plans)[0] for item in plan.items]
    return {(i.index.fqn, [*i.index.offset, 0][0], i.tensor_data.chunk.sizes.numel()) for i in items}


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_plans_of_all_ranks_hold_every_element_once_and_the_same_slices_as_torch_plans(seed: int) -> None:
    """For any stage and number of ranks. One rank writes a tensor that all ranks hold."""
    rng = random.Random(seed)
    world = rng.choice([1, 2, 3, 5, 8, 13, 64])
    states = _states(rng, world)
    mine = [writing.mine(state, rank, world) for rank, state in enumerate(states)]
    whole = _up([_part(rank, tensors) for rank, tensors in enumerate(mine)])
    index.root(1, {}, whole)
    ranks = [rank for rank in range(world) if mine[rank]]
    assert [shard.file for shard in whole.shards] == [str(rank) for rank in ranks]
    ours = {(n, ranks[c.shard], c.start, c.numel) for n, e in whole.tensors.items() for c in placement.chunks(e.runs)}
    assert ours == {(n, r, getattr(t, "start", 0), getattr(t, "local", t).numel()) for r in ranks for n, t in mine[r].items()}
    assert {(n, start, numel) for n, _, start, numel in ours} == _planned_by_torch(states)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_any_elements_are_found_in_the_chunks_that_hold_them_and_in_no_other(seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted({0, *(rng.randrange(1, 200) for _ in range(rng.randrange(8))), 200})
    even = [Chunk(i, 7 * i, 7) for i in range(rng.randrange(1, 30))]
    chunks = even if rng.random() < 0.5 else [Chunk(i, a, b - a) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    runs = placement.runs(chunks)
    end = chunks[-1].start + chunks[-1].numel
    assert list(placement.chunks(runs)) == chunks and not placement.fault(Tensor("F32", [end], runs), len(chunks))
    assert len(runs) == 1 or chunks is not even
    for _ in range(20):
        first, stop = sorted((rng.randrange(end + 1), rng.randrange(end + 1)))
        found = list(placement.chunks(runs, first, stop))
        assert found == [c for c in chunks if first < stop and c.start < stop and first < c.start + c.numel]


def test_a_slice_that_is_missing_or_there_twice_makes_no_checkpoint() -> None:
    """The error comes before `checkpoint.json` is written, and when one is read."""

    def part(*slices: tuple[int, int]) -> WrittenPart:
        return _up([_part(r, {"w": FlatShard(torch.zeros(n), s, 10)}) for r, (s, n) in enumerate(slices)])

    assert part((0, 5), (5, 5)).tensors["w"].runs == [[0, 2, 0, 5]]
    for slices, said in [
        (((0, 5), (6, 4)), "elements 5 to 6 are in no chunk, or in two"),
        (((0, 5), (4, 6)), "elements 5 to 4 are in no chunk, or in two"),
        (((0, 5), (5, 4)), "its chunks hold 9 of 10 elements"),
    ]:
        with pytest.raises(CheckpointError, match=f"can't save 'w': {said}"):
            index.root(1, {}, part(*slices))
        shards = [{"file": f"s{n}", "bytes": 99, "index": {"bytes": 1, "crc32": 1}} for n in range(2)]
        tensors = {name: dataclasses.asdict(entry) for name, entry in part(*slices).tensors.items()}
        with pytest.raises(DataError, match=f"tensors: 'w': {said}"):
            index.build({"format": 4, "shards": shards, "tensors": tensors}, None)
    assert placement.fault(Tensor("F32", [10], [[1, 2, 0, 5]]), 2) == "a chunk is in no shard"


def test_the_table_of_1024_ranks_is_small() -> None:
    """A tensor has as many runs at 1,024 ranks as at 8, for any stage that splits each parameter."""
    shapes = {f"p{i}": (1000 + i, 128) for i in range(20)}

    def runs(world: int) -> int:
        owned = zero_layout.slices(shapes, 3, world)
        sizes = {n: a * b for n, (a, b) in shapes.items()}
        parts = [
            _part(r, {n: FlatShard(torch.empty(k, device="meta"), s, sizes[n]) for n, s, k in mine})
            for r, mine in enumerate(owned)
        ]
        return sum(len(e.runs) for e in _up(parts).tensors.values())

    assert runs(1024) <= 2 * len(shapes) and runs(8) <= 2 * len(shapes)


def test_every_rank_is_reached_by_the_tree_and_none_has_many_neighbours() -> None:
    for world in [*range(1, 70), 1024, 16384]:
        above = {child: rank for rank in range(world) for child in agreement.children(rank, world)}
        assert sorted(above) == list(range(1, world)) and all(agreement.parent(c) == r < c for c, r in above.items())
        assert max(len(agreement.children(rank, world)) for rank in range(world)) <= world.bit_length()
