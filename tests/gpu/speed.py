"""How fast one GPU trains, what memory it takes beside the plan's, and how long a checkpoint blocks it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from tests.gpu import setting

LENGTH, WARM, GIB = 2048, 3, 1 << 30


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
) -> Iterator[Row]:
    """Trains for some seconds behind the first steps; one row."""
    from heliostat.cluster.peak_flops import peak_flops

    setting.start()
    keys: dict[str, Any] = {"train.precision": precision, "train.zero.stage": stage, "train.compile": compile}
    keys |= {"train.attention": attention, "train.fp8": fp8, "train.activation_checkpointing": checkpointing}
    keys |= {"train.optimizer": {"name": optimizer, "lr": 1e-4}}
    made = setting.job(MODELS[model], length, micro, 2 * micro, **keys)
    its = setting.recipe(made)
    on = setting.engine(made, its)
    setting.losses(made, its, on, 0, WARM)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not steps:
        setting.losses(made, its, on, WARM + steps, 1)  # which ends with the loss on the host
        steps += 1
    step_s = (time.perf_counter() - began) / steps
    peak = peak_flops(torch.cuda.get_device_name(), precision) if setting.GPU else None
    flops = (its.flops_per_sample(on.module) or 0.0) * made.train.global_batch
    compiling = {False: "", True: "compiled", "blocks": "compiled by layers"}[compile]
    name = f"{model}, {precision}, ZeRO-{stage}, {attention or 'sdpa'}"
    name += "".join(f", {what}" for what in (compiling, "fp8" * fp8, "checkpointing" * checkpointing) if what)
    yield {
        "kind": "speed", "what": name + (f", {optimizer}" if optimizer != "adamw" else ""), "ok": True, "steps": steps,
        "step_s": step_s, "tokens_per_second": made.train.global_batch * length / step_s,
        "mfu": flops / step_s / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if setting.GPU else None, "plan_gib": planned(made) / GIB,
    }  # fmt: skip


def planned(made: Any) -> float:
    """The plan's bytes of a worker, without its margin for fragments and the driver's own."""
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
    """How long a save beside training blocks it, and how long it takes in all."""
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
