"""Processes that outlive an attempt: what is left of one must not show in the next."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from heliostat.checkpoint import saver as checkpoint
from heliostat.config import spec
from heliostat.storage import Location
from heliostat.train.worker import deepspeed_engine, process_group, zero_state

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
    process_group.join(process_group.Place(rank, world, rank, world, f"file://{folder}/meeting-{number}", "gloo"))
    changes = {"train.zero.stage": stage, "train.precision": precision, "workers.count": world, "train.global_batch": 2 * world}
    changes |= {"train.micro_batch": 2, "train.deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    engine = deepspeed_engine.build_engine(job(**changes), Around(llama))
    zero_state.init_optimizer_state(engine)
    if load:
        found = checkpoint.open_checkpoint(Location(str(load)), 3)
        checkpoint.load(found, zero_state.state(engine, whole=True), dist.new_group(backend="gloo"))
        zero_state.after_load(engine, found.index["optimizer_steps"])
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
    saver.attach(zero_state.inner_optimizer(engine))
    facts = build_index.facts(world_size=2, optimizer_steps=zero_state.optimizer_steps(engine), job=job().dump())
    saver.save(3, zero_state.state(engine), facts, zero_state.frozen(engine))
    saver.wait()


def reform(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Two of three processes train; then the first goes on with the third, which is new to it, as if nothing had happened."""
    me = _claim(folder)
    process_group.leave()  # the group that the harness has made
    meeting = 0
    for stage, precision in LAYOUTS:
        saved = Path(folder) / f"{stage}-{precision}"
        whole: list[float] = []
        kept: Any = None
        meeting += 1
        if me in (0, 1):
            engine = _begin(folder, meeting, me, 2, stage, precision, None)
            _steps(engine, 0, 3)
            _save(engine, saved)
            whole = _steps(engine, 3, 6)
            kept = weakref.ref(engine.module)
            del engine
            process_group.leave()
        everyone.wait(60)
        meeting += 1
        if me in (0, 2):
            engine = _begin(folder, meeting, min(me, 1), 2, stage, precision, saved)
            again = _steps(engine, 3, 6)
            del engine
            process_group.leave()
            gc.collect()
            if me == 0:
                yield {"layout": [stage, precision], "whole": whole, "again": again, "freed": kept() is None}
        everyone.wait(60)


def _claim(folder: str) -> int:
    """Takes a number that no other process has."""
    for number in range(3):
        try:
            os.close(os.open(Path(folder) / f"claim-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return number
    raise AssertionError("more than three processes")


def test_a_survivor_goes_on_with_a_new_process_to_the_same_losses_at_every_stage(tmp_path):
    """To the last bit: what DeepSpeed counts in a process starts anew, and the engine before is no longer in memory."""
    told = ranks.run("tests.integration.test_reform:reform", (1, 1, 1), str(tmp_path))
    assert [tuple(t["layout"]) for t in told] == LAYOUTS
    for one in told:
        assert one["again"] == one["whole"], one
        assert one["freed"], f"{one['layout']}: the engine of an attempt outlives it"


def abandoned(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Of three processes that wait in a collective one ends; the others, told to abort meanwhile, form a group of two."""
    me = _claim(folder)
    process_group.leave()
    process_group.join(process_group.Place(me, 3, me, 3, f"file://{folder}/meeting-of-three", "gloo"))
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
    process_group.join(process_group.Place(me, 2, me, 2, f"file://{folder}/meeting-of-two", "gloo"))
    total = torch.ones(1)
    dist.all_reduce(total)
    yield {"failed": failed, "waited": waited, "total": float(total)}


def test_an_abort_while_others_wait_in_a_collective_leaves_processes_that_form_another_group(tmp_path):
    """With gloo the abort does nothing, and is in nobody's way; what it does with NCCL needs GPUs."""
    told = ranks.run("tests.integration.test_reform:abandoned", (1, 1, 1), str(tmp_path))
    assert [(t["failed"], t["total"]) for t in told] == [(True, 2.0)] * 2
    assert all(t["waited"] < 20 for t in told)


def test_the_watchdog_of_nccl_is_held_back_unless_the_environment_wants_it(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    assert process_group.reforms()
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    assert not process_group.reforms()
