"""Tests the messages of ranks along the tree: in rank order, of any size, from several threads at once, and errors to all."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch.distributed as dist
from heliostat.checkpoint.agreement import Channel, agreed, first, merged, together
from heliostat.errors import ConfigError, HeliostatError

from tests.integration import ranks

SIZES = (1, 2, 3, 5)


def _error(act: Callable[[], object]) -> dict[str, Any]:
    try:
        act()
    except HeliostatError as e:
        return {"error": type(e).__name__, "text": str(e), "caused": e.__cause__ is not None}
    return {"error": None}


def tells(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    yield {"case": "together", "value": together(group, lambda: rank)}
    yield {"case": "merged", "value": merged(group, lambda: f"{rank}", operator.add)}
    yield {
        "case": "large",
        "value": merged(group, lambda: "x" * (rank * 100_000), operator.add) == "x" * 100_000 * (world * (world - 1) // 2),
    }
    yield {"case": "first", "value": first(group, lambda: f"of {rank}")}
    yield {"case": "agreed", "value": agreed(group, lambda: rank * 10)}
    last = world - 1

    def fails(where: int, error: Exception) -> Callable[[], int]:
        def work() -> int:
            if rank == where:
                raise error
            return rank

        return work

    def add(one: int, other: int) -> int:
        raise ConfigError("no sum")

    yield {"case": "own error", **_error(lambda: together(group, fails(last, ConfigError("a: 1 is none"))))}
    yield {"case": "foreign error", **_error(lambda: merged(group, fails(last, KeyError("k")), operator.add))}
    yield {"case": "of the first", **_error(lambda: first(group, fails(0, ConfigError("b: 2 is none"))))}
    yield {"case": "merging", **_error(lambda: merged(group, lambda: 1, add))}
    yield {"case": "after", "value": together(group, lambda: rank)}

    def chat(tag: int) -> bool:
        told = [together(Channel(group, tag), partial(operator.add, (tag, n), (rank,))) for n in range(30)]
        return told == [[(tag, n, r) for r in range(world)] for n in range(30)]

    with ThreadPoolExecutor(3) as pool:
        yield {"case": "threads", "value": list(pool.map(chat, (3, 4, 5)))}


def test_ranks_tell_each_other_everything_in_order_and_all_hear_of_an_error() -> None:
    told: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(ranks.run(f"{__name__}:tells", SIZES), key=lambda row: row["rank"]):
        told.setdefault((row["case"], row["workers"]), []).append(row)
    for world in SIZES:
        every = list(range(world))

        def values(case: str, world: int = world) -> list[Any]:
            return [row["value"] for row in told[case, world]]

        assert values("together") == values("after") == [every] * world
        assert values("merged") == ["".join(map(str, every)), *[None] * (world - 1)]
        assert values("large")[0] is True
        assert values("first") == ["of 0"] * world and values("agreed") == [10 * rank for rank in every]
        assert values("threads") == [[True] * 3] * world
        for case, error, text in [
            ("own error", "ConfigError", "a: 1 is none"),
            ("foreign error", "WorkerError", f"worker {world - 1}: KeyError: 'k'"),
            ("of the first", "ConfigError", "b: 2 is none"),
        ]:
            assert [(row["error"], row["text"]) for row in told[case, world]] == [(error, text)] * world
        assert [row["caused"] for row in told["foreign error", world]] == [rank == world - 1 for rank in every]
        assert {row["error"] for row in told["merging", world]} == {"ConfigError" if world > 1 else None}
