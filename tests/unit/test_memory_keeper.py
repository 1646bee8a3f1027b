"""Copies in memory count only if they are whole: all ranks, sealed, of one generation, and undamaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from heliostat.training.driver.memory import whole
from heliostat.training.memory_keeper import CopyFacts, MemoryKeeper, Sum, summed

DATA = np.arange(1000, dtype=np.uint8)


def facts(step: int, **other: Any) -> CopyFacts:
    return CopyFacts(step, world=2, data="plan", optimizer_steps=step, **other)


def sums() -> list[Sum]:
    return [summed(DATA[:600], 0), summed(DATA[600:], 600)]


def kept(keeper: MemoryKeeper, id: str, rank: int, step: int, seal: bool = True) -> None:
    keeper.open(id, rank, len(DATA))
    keeper.write(id, rank, 0, DATA[:600])
    keeper.write(id, rank, 600, DATA[600:])
    if seal:
        keeper.seal(id, rank, sums(), facts(step), [], b"")


def test_a_generation_is_whole_once_every_rank_has_sealed_its_copy_on_some_node():
    one, other = MemoryKeeper(), MemoryKeeper()
    kept(one, "a:10", 0, 10)
    kept(other, "a:10", 1, 10)
    kept(one, "a:20", 0, 20)
    kept(other, "a:20", 1, 20, seal=False)
    assert whole({"n": one.held(), "m": other.held()}, "plan") == [("a:10", 10, 2)]
    assert whole({"n": one.held()}, "plan") == [], "the copy of rank 1 is on the node that is gone"
    other.seal("a:20", 1, sums(), facts(20), [], b"")
    assert whole({"n": one.held(), "m": other.held()}, "plan") == [("a:20", 20, 2), ("a:10", 10, 2)]


def test_copies_that_do_not_agree_are_none():
    held = [("a:10", 0, facts(10, loss_scale={"cur_scale": 1.0})), ("a:10", 1, facts(10, loss_scale={"cur_scale": 2.0}))]
    assert whole({"n": held}, "plan") == []
    assert whole({"n": [("a:10", 0, facts(10)), ("b:10", 1, facts(10))]}, "plan") == [], "of two attempts"


def test_the_oldest_generation_makes_room_when_a_third_begins():
    keeper = MemoryKeeper()
    for step in (10, 20):
        for rank in (0, 1):
            kept(keeper, f"a:{step}", rank, step)
    kept(keeper, "a:30", 0, 30, seal=False)
    assert [g[0] for g in whole({"n": keeper.held()}, "plan")] == ["a:20"]
    assert keeper.read("a:20", 1, [(0, 2), (998, 1000)]).tolist() == [0, 1, 230, 231]
    keeper.begin("a:20")
    assert {id for id, _, _ in keeper.held()} == {"a:20"}
    keeper.begin(None)
    assert keeper.held() == []


def test_damage_is_found_on_the_way_and_while_it_lies_there():
    keeper = MemoryKeeper()
    kept(keeper, "a:10", 0, 10)
    kept(keeper, "a:10", 1, 10)
    assert keeper.intact("a:10") == [0, 1]
    keeper.write("a:10", 0, 500, DATA[:1])
    assert keeper.intact("a:10") == [1]
    keeper.open("a:20", 0, len(DATA))
    with pytest.raises(ValueError, match="did not arrive"):
        keeper.seal("a:20", 0, [sums()[0]], facts(20), [], b"")
    assert [id for id, _, _ in keeper.held()] == ["a:10", "a:10"]


def test_what_is_needed_is_two_generations_of_all_workers():
    keeper = MemoryKeeper()
    keeper.reserve(0, 1000)
    keeper.reserve(1, 500)
    keeper.reserve(1, 500)
    assert keeper.need() == 3000
    keeper.begin(None)
    assert keeper.need() == 0
