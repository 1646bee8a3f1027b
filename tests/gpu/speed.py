"""Measures the speed of one GPU, its memory against the plan, and how long a checkpoint blocks it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.gpu import setting
from tests.gpu.correctness import LIMITS, apart

LENGTH, WARM, GIB = 2048, 3, 1 << 30
WITHIN = 0.1  # relative, of the plan's memory
HIDDEN = 0.5  # of the time that copies of activations take: so much at least is beside computing


def _llama(hidden: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {"arch": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "intermediate_size": inner, "vocab_size": 32000, **more}  # fmt: skip


MODELS = {
    "tiny": setting.TINY,
    "0.4B": _llama(1024, 24, 16, 2816),
    "1B": _llama(2048, 16, 16, 5632),
    "2.7B": _llama(2560, 32, 20, 6912),
    "1B, 8 experts": _llama(1024, 12, 16, 2816, arch="mixtral", num_local_experts=8, num_experts_per_tok=2),
}
MEMORY: list[tuple[str, int, dict[str, Any]]] = [
    ("1B", 4, {"train.zero.stage": 1}),
    ("1B", 4, {"train.zero.stage": 3, "train.activation_checkpointing": True}),
    ("1B", 4, {"train.zero.stage": 2, "train.zero.offload.optimizer": "cpu", "train.activation_checkpointing": True}),
    ("0.4B", 8, {"train.zero.stage": 1, "train.tiled_loss": True}),
]
Row = dict[str, Any]


def train(
    model: str,
    precision: str = "bf16",
    stage: int = 1,
    micro: int = 4,
    attention: str | None = None,
    compile: bool | str = False,
    fp8: bool = False,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    length: int = LENGTH,
    seconds: float = 12.0,
    goal: float | None = None,
) -> Iterator[Row]:
    """Trains for some seconds after the first steps; yields one row. `goal`: the MFU that an H100 must reach."""
    from heliostat.cluster.peak_flops import peak_flops

    setting.start()
    keys: dict[str, Any] = {"train.precision": precision, "train.zero.stage": stage, "train.compile": compile}
    keys |= {"train.attention": attention, "train.fp8": fp8, "train.activation_checkpointing": checkpointing}
    keys |= {"train.optimizer": {"name": optimizer, "lr": 1e-4}}
    made = setting.job(MODELS[model], length, micro, 2 * micro, **keys)
    its = setting.recipe(made)
    on = setting.engine(made, its)
    step_s, steps = _timed(made, its, on, seconds)
    peak = peak_flops(torch.cuda.get_device_name(), precision) if setting.GPU else None
    flops = (its.flops_per_sample(on.module) or 0.0) * made.train.global_batch_size
    mfu = flops / step_s / peak if peak else None
    compiling = {False: "", True: "compiled", "blocks": "compiled by layers"}[compile]
    name = f"{model}, {precision}, ZeRO-{stage}, {attention or 'sdpa'}"
    name += "".join(f", {what}" for what in (compiling, "fp8" * fp8, "checkpointing" * checkpointing) if what)
    missed = goal is not None and mfu is not None and "H100" in torch.cuda.get_device_name() and mfu < goal
    yield {
        "kind": "speed", "what": name + (f", {optimizer}" if optimizer != "adamw" else ""), "ok": not missed, "steps": steps,
        "step_s": step_s, "tokens_per_second": made.train.global_batch_size * length / step_s, "mfu": mfu, "goal": goal,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if setting.GPU else None, "plan_gib": planned(made) / GIB,
    }  # fmt: skip


def _timed(made: Any, its: Any, on: Any, seconds: float) -> tuple[float, int]:
    """Returns the seconds per step after the first ones, and the number of timed steps."""
    setting.losses(made, its, on, 0, WARM)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not steps:
        setting.losses(made, its, on, WARM + steps, 1)  # which ends with the loss on the host
        steps += 1
    return (time.perf_counter() - began) / steps, steps


@contextmanager
def _engine(made: Any) -> Iterator[tuple[Any, Any]]:
    """Yields a recipe and its engine; frees the engine's memory afterwards."""
    from heliostat.engine import deepspeed_engine

    its = setting.recipe(made)
    yield its, setting.engine(made, its)
    deepspeed_engine.destroy_engines()
    deepspeed_engine.forget_groups()
    if setting.GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(small: bool = False) -> Iterator[Row]:
    """Compares the peak memory of steps with the plan's."""
    setting.start()
    length = 64 if small else LENGTH
    for model, micro, keys in MEMORY:
        keys = {"train.precision": "bf16", **keys}
        made = setting.job(MODELS["tiny" if small else model], length, micro, 2 * micro, **keys)
        with _engine(made) as (its, on):
            setting.losses(made, its, on, 0, 2)
            peak = torch.cuda.max_memory_allocated() if setting.GPU and not small else None
            del its, on
        plan = planned(made)
        difference = abs(peak / plan - 1) if peak else None
        words = [f"{key.removeprefix('train.')}={value}" for key, value in keys.items()]
        yield {
            "kind": "memory", "what": ", ".join([model, *words]),
            "ok": difference is None or difference <= WITHIN, "difference": difference, "limit": WITHIN,
            "peak_gib": peak / GIB if peak else None, "plan_gib": plan / GIB,
        }  # fmt: skip


def activation_offload(small: bool = False) -> Iterator[Row]:
    """Measures the cost of activations in host memory per step, against the time of their copies alone."""
    setting.start()
    model, length, micro, seconds = ("tiny", 64, 2, 0.2) if small else ("1B", LENGTH, 4, 8.0)
    losses, step_s = [], []
    for offload in (False, True):
        keys = {"train.precision": "bf16", "train.activation_checkpointing": True, "train.activation_offload": offload}
        made = setting.job(MODELS[model], length, micro, 2 * micro, **keys)
        with _engine(made) as (its, on):
            losses.append(setting.losses(made, its, on, 0, WARM))
            step_s.append(_timed(made, its, on, seconds)[0])
            peak = torch.cuda.max_memory_allocated() / GIB if setting.GPU else None
            del its, on
    shape = MODELS[model]
    copies_s = 2 * _copies_s(shape["num_hidden_layers"] * micro * length * shape["hidden_size"])
    overlap = None if small else min(1.0, max(0.0, 1 - (step_s[1] - step_s[0]) / copies_s))
    problem = "" if apart(losses[1], losses[0]) <= LIMITS["bf16"] else "the losses differ from those without offload"
    yield {
        "kind": "overlap", "what": f"{model}, activations in host memory", "step_s": step_s[1], "without_s": step_s[0],
        "copies_s": copies_s, "overlap": overlap, "peak_gib": peak, "problem": problem,
        "ok": not problem and (overlap is None or overlap >= HIDDEN),
    }  # fmt: skip


def _copies_s(elements: int) -> float:
    """Returns the seconds to copy so many bf16 numbers to pinned memory and back."""
    on = torch.empty(elements, dtype=torch.bfloat16, device=setting.DEVICE)
    host = torch.empty(elements, dtype=torch.bfloat16, pin_memory=setting.GPU)
    for _ in range(2):  # the first one is slower
        if setting.GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        host.copy_(on, non_blocking=True)
        on.copy_(host, non_blocking=True)
        if setting.GPU:
            torch.cuda.synchronize()
    return time.perf_counter() - began


def planned(made: Any) -> float:
    """Returns the plan's bytes of a worker, without its margin for fragmentation and the driver's own memory."""
    import numpy as np
    from heliostat.plan import hardware, layouts, model_stats
    from heliostat.plan.counts import Counts
    from heliostat.plan.estimate import Planner

    bare = setting.recipe(setting.job(made.model, made.data.sequence_length, 1, 1, **{"train.attention": made.train.attention}))
    model = model_stats.build(bare)
    stats = model_stats.stats_of(bare, model)
    kept = model_stats.activations(made, bare, model, np.zeros((1, made.data.sequence_length), dtype=np.int32))
    prices = hardware.table()
    planner = Planner(made, Counts(stats, kept, ()), hardware.resolve(made, prices, None, None), prices)
    _, need, _ = planner._memory(layouts.of(made), made.accumulation)
    return float(need.total - need.margin)


def checkpoint(model: str, stage: int = 1) -> Iterator[Row]:
    """Measures how long a save blocks training, and how long it takes in total."""
    from heliostat.checkpoint import saver
    from heliostat.config import spec
    from heliostat.engine import sharded_state
    from heliostat.storage.locations import Location

    from tests.unit import build_index

    group = setting.start()
    keys = {"train.precision": "bf16", "train.zero.stage": stage, "train.activation_checkpointing": True}
    made = setting.job(MODELS[model], LENGTH if setting.GPU else 64, 2, 2, **keys)
    its = setting.recipe(made)
    on = setting.engine(made, its)
    with tempfile.TemporaryDirectory() as folder:
        saves = saver.Saver(Location(folder), spec.Checkpoint(every=1, keep=1), group)
        saves.attach(sharded_state.of(on).optimizer)
        setting.losses(made, its, on, 0, 2)
        began, before = time.perf_counter(), saves.blocked_s
        facts = build_index.facts(optimizer_steps=sharded_state.of(on).steps)
        saves.save(2, sharded_state.of(on).tensors(), facts)
        setting.losses(made, its, on, 2, 2)
        blocked = saves.blocked_s - before
        saves.wait()
        size = 12 * sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in on.module.parameters())
        yield {"kind": "checkpoint", "what": f"{model}, ZeRO-{stage}", "ok": True, "gib": size / GIB, "blocked_s": blocked,
               "seconds": time.perf_counter() - began}  # fmt: skip
