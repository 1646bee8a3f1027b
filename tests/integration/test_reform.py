"""Tests processes that survive an attempt: the state of one attempt must not affect the next."""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint import saver as checkpoint
from heliostat.config import spec
from heliostat.engine import deepspeed_engine, process_group, sharded_state
from heliostat.storage.locations import Location

from tests.integration import ranks
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}


def llama() -> torch.nn.Module:
    import transformers

    config = transformers.LlamaConfig(**LLAMA, use_cache=False)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _begin(folder: str, number: int, rank: int, world: int, stage: int, precision: str, load: Path | None) -> Any:
    """Joins a new group and builds an engine in it, as an attempt does; loads a checkpoint."""
    process_group.join(process_group.WorkerPlace(rank, world, rank, world, f"file://{folder}/meeting-{number}", "gloo"))
    changes = {
        "train.zero.stage": stage,
        "train.precision": precision,
        "workers.count": world,
        "train.global_batch_size": 2 * world,
    }
    changes |= {"train.micro_batch_size": 2, "train.deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    engine = deepspeed_engine.build_engine(job(**changes), Around(llama))
    if load:
        found = checkpoint.open_checkpoint(Location(str(load)), 3)
        checkpoint.load(found, sharded_state.of(engine).tensors(whole=True), dist.new_group(backend="gloo"))
        sharded_state.of(engine).after_load(found.index.resume["optimizer_steps"])
    return engine


def _steps(engine: Any, first: int, last: int) -> list[float]:
    rank, world, losses = dist.get_rank(), dist.get_world_size(), []
    for step in range(first, last):
        ids = torch.randint(0, 96, (world, 2, 16), generator=torch.Generator().manual_seed(step))[rank]
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        if not engine.zero_optimization_stage():
            deepspeed_engine.gradient_norm(engine, 1.0)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def _save(engine: Any, folder: Path) -> None:
    saver = checkpoint.Saver(Location(str(folder)), spec.Checkpoint(every=1), dist.new_group(backend="gloo"))
    saver.attach(sharded_state.of(engine).optimizer)
    facts = build_index.facts(world_size=2, optimizer_steps=sharded_state.of(engine).steps, job=job().dump())
    saver.save(3, sharded_state.of(engine).tensors(), facts, sharded_state.of(engine).frozen())
    saver.wait()


def reform(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Two of three processes train. Then the first continues with the third, which is new to it, as if nothing had happened."""
    me = _claim(folder)
    process_group.leave()  # the group that the harness has made
    meeting = 0
    for stage, precision in LAYOUTS:
        saved = Path(folder) / f"{stage}-{precision}"
        whole: list[float] = []
        freed = False
        meeting += 1
        if me in (0, 1):
            engine = _begin(folder, meeting, me, 2, stage, precision, None)
            _steps(engine, 0, 3)
            _save(engine, saved)
            whole = _steps(engine, 3, 6)
            kept = weakref.ref(engine.module)
            del engine
            process_group.leave()
            freed = kept() is None  # at once: without it, the process groups that it knows stay open, and others wait for them
        everyone.wait()
        meeting += 1
        if me in (0, 2):
            engine = _begin(folder, meeting, min(me, 1), 2, stage, precision, saved)
            again = _steps(engine, 3, 6)
            del engine
            process_group.leave()
            if me == 0:
                yield {"layout": [stage, precision], "whole": whole, "again": again, "freed": freed}
        everyone.wait()


def _claim(folder: str) -> int:
    """Takes a number that no other process has."""
    for number in range(5):
        try:
            os.close(os.open(Path(folder) / f"claim-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return number
    raise AssertionError("more than five processes")


def test_a_survivor_goes_on_with_a_new_process_to_the_same_losses_at_every_stage(tmp_path):
    """To the last bit: DeepSpeed's counters in the process start again, and the earlier engine is no longer in memory."""
    told = ranks.run("tests.integration.test_reform:reform", (1, 1, 1), str(tmp_path))
    assert [tuple(t["layout"]) for t in told] == LAYOUTS
    for one in told:
        assert one["again"] == one["whole"], one
        assert one["freed"], f"{one['layout']}: the engine of an attempt outlives it"


def abandoned(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Ends one of three processes that wait in a collective. The others get an abort meanwhile, and form a group of two."""
    me = _claim(folder)
    process_group.leave()
    process_group.join(process_group.WorkerPlace(me, 3, me, 3, f"file://{folder}/meeting-of-three", "gloo"))
    dist.barrier()
    if me == 2:
        time.sleep(1)
        os._exit(0)
    threading.Timer(0.3, process_group.abort).start()
    began = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1))
        failed = False
    except RuntimeError:
        failed = True
    waited = time.monotonic() - began
    process_group.leave()
    process_group.join(process_group.WorkerPlace(me, 2, me, 2, f"file://{folder}/meeting-of-two", "gloo"))
    total = torch.ones(1)
    dist.all_reduce(total)
    yield {"failed": failed, "waited": waited, "total": float(total)}


def test_an_abort_while_others_wait_in_a_collective_leaves_processes_that_form_another_group(tmp_path):
    """With gloo, the abort has no effect and does no harm. Its effect with NCCL needs GPUs."""
    told = ranks.run("tests.integration.test_reform:abandoned", (1, 1, 1), str(tmp_path))
    assert [(t["failed"], t["total"]) for t in told] == [(True, 2.0)] * 2
    assert all(t["waited"] < 20 for t in told)


def test_the_watchdog_of_nccl_is_held_back_unless_the_environment_wants_it(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    assert process_group.reforms()
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    assert not process_group.reforms()


def _copy_out(engine: Any, folder: Path) -> None:
    """Writes this rank's part of the state to a file, in the form of an in-memory checkpoint."""
    state = sharded_state.of(engine).tensors()
    layout = flat_copy.layout(state)
    buffer = flat_copy.as_buffer(flat_copy.size(layout), False)
    flat_copy.pack(state, layout, buffer)
    folder.mkdir(exist_ok=True)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps([astuple(r) for r in layout]))
    np.save(folder / f"{dist.get_rank()}.npy", buffer.numpy())
    dist.barrier()


def _copy_in(engine: Any, folder: Path, steps: int) -> None:
    """Loads this rank's slices from such files of any number of ranks."""
    ranks = sorted(int(f.stem) for f in folder.glob("*.json"))
    layouts = {r: [flat_copy.FlatRange(*one) for one in json.loads((folder / f"{r}.json").read_text())] for r in ranks}
    state = sharded_state.of(engine).tensors(whole=True)
    wanted = flat_copy.layout(state)
    buffer = flat_copy.as_buffer(flat_copy.size(wanted), False)
    for piece in flat_copy.pieces(layouts, wanted):
        data = np.load(folder / f"{piece.rank}.npy")[piece.source : piece.source + piece.size]
        buffer[piece.target : piece.target + piece.size] = torch.from_numpy(data)
    flat_copy.unpack(state, wanted, buffer)
    sharded_state.of(engine).after_load(steps)


def resized(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Three processes train, two of them continue, then three again. At the same time, other processes do the same, of which some
    or all are new."""
    me = _claim(folder)
    process_group.leave()
    meetings = iter(range(1000))
    for stage in (0, 2, 3):
        three, two = Path(folder) / f"three-{stage}", Path(folder) / f"two-{stage}"

        def go_on(
            ranks: tuple[int, ...], load: Path | None, copies: bool = False, keep: Path | None = None, stage: int = stage
        ) -> list[float]:
            """Trains in the given processes, from a checkpoint or from in-memory copies; keeps both after the third step."""
            number = next(meetings)
            losses: list[float] = []
            if me in ranks:
                at = None if copies else load
                engine = _begin(folder, number, ranks.index(me), len(ranks), stage, "fp32", at)
                if copies and load:
                    _copy_in(engine, load.with_suffix(".copies"), 3)
                first = 3 if load else 0
                losses = _steps(engine, first, first + 3)
                if keep:
                    _save(engine, keep)
                    _copy_out(engine, keep.with_suffix(".copies"))
                del engine
                process_group.leave()
            everyone.wait()
            return losses

        go_on((0, 1, 2), None, keep=three)
        shrunk = [go_on((0, 1), three), go_on((3, 4), three), go_on((1, 3), three, copies=True)]
        go_on((0, 1), None, keep=two)
        grown = [go_on((0, 1, 2), two), go_on((4, 0, 3), two), go_on((2, 3, 4), two, copies=True)]
        if me == 3:  # in the last two of each
            yield {"stage": stage, "shrunk": shrunk[1:], "grown": grown[1:]}
        if me == 0:
            yield {"stage": stage, "shrunk": shrunk[:1], "grown": grown[:2]}


@pytest.mark.ci
def test_survivors_of_a_resize_go_on_to_the_losses_of_new_processes_from_storage_and_from_memory(tmp_path):
    """Three to two and two to three, to the last bit, at ZeRO 0, 2, and 3."""
    told = ranks.run("tests.integration.test_reform:resized", (1,) * 5, str(tmp_path))
    for stage in (0, 2, 3):
        mine = [t for t in told if t["stage"] == stage]
        shrunk, grown = ([losses for t in mine for losses in t[way]] for way in ("shrunk", "grown"))
        assert len(shrunk) == 3 and len(grown) == 4
        assert all(losses == shrunk[0] for losses in shrunk), (stage, shrunk)
        assert all(losses == grown[0] for losses in grown), (stage, grown)
