"""Measures the seconds to save, load, and reshard a checkpoint, against DeepSpeed's own, in one run.

    python -m tests.benchmarks.checkpoint [--rounds 3] [--size 50 200]

Llamas of 50M and 200M parameters, bf16 over fp32 master weights, ZeRO-3 on 4 processes of one thread, gloo, local disk, and a
warm page cache. The two alternate, and each number is the median over the rounds of the slowest rank.

"Blocked" is the time that training loses: for heliostat, `Saver.blocked_s` after the save and the next whole step; for DeepSpeed,
all of `save_checkpoint`. heliostat's save ends when `checkpoint.json` is on the disk (fsync); DeepSpeed leaves its files in the
page cache. For another number of workers, DeepSpeed converts (`ds_to_universal`, once) and then loads.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import harness
from tests.integration import ranks
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

SHAPES = {50: {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8},
          200: {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14}}  # fmt: skip
DEADLINE_S = 1200


def llama(size: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape: Any = SHAPES[int(size)]
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=8192, num_attention_heads=8, **shape))


def engine(size: str, stage: int, workers: int, universal: bool = False) -> Any:
    from heliostat.engine import deepspeed_engine

    changes: dict[str, Any] = {"train.zero.stage": stage, "workers.count": workers, "train.global_batch_size": workers}
    changes |= {"train.micro_batch_size": 1, "train.deepspeed": {"checkpoint": {"load_universal": universal}}}
    return deepspeed_engine.build_engine(job(**changes), Around(lambda: llama(size)))


def train(made: Any) -> None:
    import torch

    tokens = torch.randint(0, 8192, (1, 64))
    made.backward(made(input_ids=tokens, labels=tokens).loss)
    made.step()


def slowest(group: Any, name: str, seconds: float) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    most = torch.tensor(seconds)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return {"name": name, "seconds": float(most)}


def timed(group: Any, name: str, action: Callable[[], object]) -> dict[str, Any]:
    """Returns the slowest rank's seconds."""
    import torch.distributed as dist

    dist.barrier(group)
    start = time.perf_counter()
    action()
    return slowest(group, name, time.perf_counter() - start)


def load(made: Any, group: Any, folder: str) -> int:
    from heliostat.checkpoint import saver as checkpoint
    from heliostat.engine import sharded_state
    from heliostat.storage.locations import Location

    found = checkpoint.latest(Location(folder))
    assert found
    read = checkpoint.load(found, sharded_state.of(made).tensors(whole=True), group)
    sharded_state.of(made).after_load(found.index.resume["optimizer_steps"])
    return read


def save_and_load(group: Any, everyone: Any, folder: str, size: str, rounds: str) -> Iterator[dict[str, Any]]:
    """Runs training steps, saves, and loads with ZeRO-3 on 4 processes."""
    import torch.distributed as dist
    from heliostat.checkpoint import saver as checkpoint
    from heliostat.config import spec
    from heliostat.engine import sharded_state
    from heliostat.storage.locations import Location

    made = engine(size, 3, dist.get_world_size())
    yield {"name": "parameters", "seconds": sum(p.ds_numel for p in made.module.parameters())}
    saver = checkpoint.Saver(Location(folder), spec.Checkpoint(every=1, keep=1), dist.new_group(backend="gloo"))
    saver.attach(sharded_state.of(made).optimizer)
    train(made)

    def save(step: int) -> None:
        saver.save(step, sharded_state.of(made).tensors(), build_index.facts(optimizer_steps=sharded_state.of(made).steps))

    def save_whole(step: int) -> None:
        save(step)
        saver.wait()

    for step in range(0, 2 * int(rounds), 2):
        yield timed(group, "step", lambda: train(made))
        yield timed(group, "their save", lambda s=step: made.save_checkpoint(f"{folder}/deepspeed", tag=f"step{s}"))
        if dist.get_rank() == 0:  # both keep one checkpoint
            shutil.rmtree(f"{folder}/deepspeed/step{step - 2}", ignore_errors=True)
        subprocess.run(["sync"], check=True)
        before = saver.blocked_s
        save(step)
        yield timed(group, "step while saving", lambda: train(made))
        yield slowest(group, "blocked", saver.blocked_s - before)
        saver.wait()
        subprocess.run(["sync"], check=True)
        yield timed(group, "save", lambda s=step + 1: save_whole(s))
    for _ in range(int(rounds)):
        yield timed(group, "load", lambda: load(made, group, folder))
        yield timed(group, "their load", lambda: made.load_checkpoint(f"{folder}/deepspeed"))


def reshard(group: Any, everyone: Any, folder: str, size: str, rounds: str, stage: str) -> Iterator[dict[str, Any]]:
    """Loads the checkpoints of ZeRO-3 on 4 processes at another stage and number of workers."""
    import torch.distributed as dist

    made = engine(size, int(stage), dist.get_world_size())
    for _ in range(int(rounds)):
        yield timed(group, f"load at {stage}", lambda: load(made, group, folder))
    yield {"name": f"bytes at {stage}", "seconds": load(made, group, folder)}


def their_reshard(group: Any, everyone: Any, folder: str, size: str, rounds: str, stage: str) -> Iterator[dict[str, Any]]:
    import torch.distributed as dist

    made = engine(size, int(stage), dist.get_world_size(), universal=True)
    for _ in range(int(rounds)):
        yield timed(group, f"their load at {stage}", lambda: made.load_checkpoint(f"{folder}/deepspeed", tag="universal"))


def convert(folder: str) -> float:
    newest = Path(folder, "deepspeed/latest").read_text()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"{folder}/deepspeed/{newest}",
               "--output_folder", f"{folder}/deepspeed/universal"]  # fmt: skip
    return harness.process(command).wall


def measure(size: int, rounds: int, folder: str) -> dict[str, float]:
    """Returns the median seconds by name."""
    found: dict[str, list[float]] = {}

    def phase(function: str, workers: int, *arguments: str) -> None:
        given = (folder, str(size), str(rounds), *arguments)
        for row in ranks.run(f"tests.benchmarks.checkpoint:{function}", (workers,), *given, deadline_s=DEADLINE_S):
            found.setdefault(row["name"], []).append(row["seconds"])

    phase("save_and_load", 4)
    found["convert"] = [convert(folder)]
    for stage in ("3", "1"):
        phase("reshard", 2, stage)
        try:
            phase("their_reshard", 2, stage)
        except AssertionError as e:
            print(f"DeepSpeed at stage {stage}: {str(e)[-1500:]}", file=sys.stderr)
            found[f"their load at {stage}"] = [float("nan")]
    return {name: median(values) for name, values in found.items()}


def table(got: dict[str, float]) -> None:
    rows = [("training blocked by a save", got["blocked"], got["their save"]), ("save, complete", got["save"], got["their save"]),
            ("load, same stage and workers", got["load"], got["their load"])]  # fmt: skip
    for stage, what in (("3", "4 -> 2 workers"), ("1", "4 -> 2 workers, stage 3 -> 1")):
        rows.append((f"load, {what}", got[f"load at {stage}"], got["convert"] + got[f"their load at {stage}"]))
    harness.head("seconds", "heliostat", "DeepSpeed", "ratio")
    for what, ours, theirs in rows:
        harness.row(what, f"{ours:.2f}", *((f"{theirs:.2f}", f"{ours / theirs:.3f}") if theirs == theirs else ("fails", "-")))


def main() -> None:
    options = harness.arguments(__doc__, rounds=3, size=sorted(SHAPES))
    for size in options.size:
        with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
            got = measure(size, options.rounds, folder)
        print(f"\n{got['parameters'] / 1e6:.0f}M parameters, ZeRO-3 on 4 workers, {options.rounds} rounds, medians")
        table(got)
        print(
            f"A step takes {got['step']:.2f} s, {got['step while saving']:.2f} s beside a save; "
            f"DeepSpeed's conversion alone {got['convert']:.2f} s; "
            f"read at stage 3 on 2 workers: {got['bytes at 3'] / 1e6:,.0f} MB a rank of {got['parameters'] * 12e-6:,.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
