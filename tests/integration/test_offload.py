"""Tests that offloaded state on the host is saved, restored, averaged, and stepped in place, although a GPU's accessors copy it.

Here all memory is the host's. So `apart` makes `Tensor.to` copy wherever DeepSpeed asks for the accelerator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint import saver as checkpoint
from heliostat.config import spec
from heliostat.config.averages import Ema
from heliostat.config.train_section import Offload
from heliostat.engine import deepspeed_engine, ema, sharded_state
from heliostat.errors import TrainingError
from heliostat.numerics import play
from heliostat.storage.locations import Location

from tests.integration import ranks
from tests.integration.test_optimizers import AFTER, TRAINED, Layout, Model, _job, _load, _play
from tests.unit import build_index
from tests.unit.build_recipe import Around

WORKERS = 2
CASES = [
    *((variant, Layout("fp32", 3, WORKERS), "cpu") for variant in ("adamw", "muon", "schedule_free")),
    ("adamw", Layout("bf16", 3, WORKERS), "cpu"),
    ("muon", Layout("bf16", 3, WORKERS), None),
    *(("adamw", Layout("bf16", stage, WORKERS), "cpu") for stage in (1, 2)),
]


class Accelerator(str):
    """Replaces the accelerator's name where DeepSpeed passes it to `Tensor.to`."""


def apart() -> None:
    """Makes transfers to the accelerator copies, as on a GPU."""
    from deepspeed.accelerator import get_accelerator

    name, to, accelerator = Accelerator("cpu"), torch.Tensor.to, get_accelerator()

    def copied(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        made = to(tensor, *given, **named)
        asked = any(isinstance(value, Accelerator) for value in (*given, *named.values()))
        return made.detach().clone() if asked and made is tensor else made

    accelerator.current_device_name = lambda: name
    accelerator.device_name = lambda index=None: name
    torch.Tensor.to = copied


def _engine(variant: str, layout: Layout, offload: str | None) -> Any:
    made = _job(variant, layout)
    where = {"optimizer": offload, "param": offload if layout.stage == 3 else None}
    zero = made.train.zero.model_copy(update={"offload": Offload.model_validate(where)})
    made = made.model_copy(update={"train": made.train.model_copy(update={"zero": zero})})
    return deepspeed_engine.build_engine(made, Around(Model))


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def copies(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In both ranks, yields the losses of each case as the host alone computes them, then with an accelerator that copies."""
    host = {case: _play(_engine(*case), 0, TRAINED + AFTER) for case in CASES}
    apart()
    for number, case in enumerate(CASES):
        engine = _engine(*case)
        losses = _play(engine, 0, TRAINED)
        run, state = Location(f"{folder}/{number}"), sharded_state.of(engine).tensors(whole=True)
        saver = checkpoint.Saver(run, spec.Checkpoint(every=1), group)
        saver.save(TRAINED, sharded_state.of(engine).tensors(), build_index.facts(optimizer_steps=sharded_state.of(engine).steps))
        saver.wait()
        saved, ranges = play.state(engine), flat_copy.layout(state)
        buffer = flat_copy.as_buffer(flat_copy.size(ranges), False)
        flat_copy.pack(state, ranges, buffer)

        average = ema.AveragedWeights(engine, Ema(decay=0.5))
        before = average.state(whole=True)
        for shard in before.values():
            shard.local.mul_(0.5)
        with average.applied():
            shown = all(torch.equal(m, saved[f"master.{name}"] * 0.5) for name, m in play.masters(engine).items())
        told = {"case": number, "host": host[case], "shown": shown, "back": _same(play.state(engine), saved)}
        losses += _play(engine, TRAINED, AFTER)
        average.update(TRAINED + AFTER)

        _load(run, engine, group)
        told |= {"restored": _same(play.state(engine), saved), "again": losses[:TRAINED] + _play(engine, TRAINED, AFTER)}
        for shard in state.values():
            shard.local.fill_(float("nan"))
        flat_copy.unpack(state, ranges, buffer)
        sharded_state.of(engine).after_load(TRAINED)
        told |= {"from_memory": _same(play.state(engine), saved), "after": losses[:TRAINED] + _play(engine, TRAINED, AFTER)}
        yield {**told, "losses": losses}


def test_offloaded_state_is_restored_and_stepped_in_place_where_the_accelerator_copies(tmp_path) -> None:
    """From storage and from memory, with every optimizer that reads its own slices, at each stage that offloads."""
    told = ranks.run(f"{__name__}:copies", (WORKERS,), str(tmp_path))
    assert len(told) == len(CASES) * WORKERS
    for row in told:
        case = CASES[row["case"]]
        assert row["losses"] == row["host"], case
        assert row["restored"] and row["again"] == row["losses"], case
        assert row["from_memory"] and row["after"] == row["losses"], case
        assert row["shown"] and row["back"], case


def copied_slices(group: Any, everyone: Any) -> Iterator[dict[str, Any]]:
    """In both ranks, at each stage, yields the error if slices are copies, as a change of DeepSpeed could make them."""
    of = sharded_state.SlicePlace.of
    for stage in range(4):
        engine = _engine("adamw", Layout("fp32", stage, WORKERS), "cpu" if stage else None)
        before = play.state(engine)
        sharded_state.SlicePlace.of = lambda place, tensor: of(place, tensor).clone()
        try:
            sharded_state.of(engine).prove()
            error = ""
        except TrainingError as e:
            error = str(e)
        sharded_state.SlicePlace.of = of
        yield {"stage": stage, "error": error, "same": _same(play.state(engine), before)}


def test_training_is_refused_if_a_slice_is_a_copy() -> None:
    """At every stage. The state is unchanged after the check."""
    told = ranks.run(f"{__name__}:copied_slices", (WORKERS,))
    assert {row["stage"] for row in told} == {0, 1, 2, 3} and all(row["same"] for row in told)
    for row in told:
        assert row["error"].startswith("train.zero: heliostat can't restore ") and f"stage {row['stage']}" in row["error"], row


@pytest.mark.parametrize("numel", [1, 2, 3, 10])
def test_the_probe_writes_into_both_ends_of_a_slice(numel: int) -> None:
    values = torch.arange(float(numel))
    sharded_state._ends(values).fill_(-1)
    assert [i for i, v in enumerate(values.tolist()) if v == -1] == sorted({0, numel - 1})
