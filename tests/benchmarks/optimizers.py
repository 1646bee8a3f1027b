"""Compares optimizers by held-out loss against CPU seconds: a small Llama on the source code of Python's own library, as bytes.

    python -m tests.benchmarks.optimizers [--steps 400] [--seeds 3] [--only muon lion] [--times 0.3 1 3]

One process of one thread, ZeRO-1, fp32: heliostat's own engine and optimizers, each with the learning rate in `RATES`; `--times`
tries multiples of it. Seconds are CPU time of training steps alone. Every optimizer gets the same batches, and files are held out
by the hash of their path.
"""

from __future__ import annotations

import hashlib
import sysconfig
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from heliostat.config.schedules import factor
from heliostat.engine import deepspeed_engine, ema

from tests.benchmarks import harness
from tests.gpu import setting

MODEL = {**setting.TINY, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3,
         "intermediate_size": 256, "vocab_size": 256}  # fmt: skip
LENGTH, BATCH, HELD_OUT, LOOKS = 128, 8, 256, 4
RATES = {"adamw": 1.5e-3, "muon": 1e-2, "lion": 1e-3, "schedule_free": 2.5e-3, "rmsprop": 1e-3, "sgd": 0.1}


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes to train on, and held-out bytes."""
    halves: tuple[list[bytes], list[bytes]] = ([], [])
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-df-z]*/*.py")):  # tables of encodings are no code
        if "site-packages" not in path.parts:
            digest = hashlib.sha256(str(path.relative_to(root)).encode()).digest()
            halves[digest[0] < 26].append(path.read_bytes())
    train, held = (np.frombuffer(b"\n".join(parts), dtype=np.uint8).astype(np.int32) for parts in halves)
    return train, held


def rows(data: np.ndarray, count: int, seed: int) -> np.ndarray:
    starts = np.random.default_rng(seed).integers(0, len(data) - LENGTH, count)
    return np.stack([data[at : at + LENGTH] for at in starts])


def play(name: str, rate: float, steps: int, seed: int, data: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[float, float]]:
    """Trains, and measures the held-out loss `LOOKS` times: (CPU seconds of the steps so far, loss)."""
    schedule = {
        "name": "constant" if name == "schedule_free" else "linear",
        "warmup_steps": max(1, steps // 20),
        "final_ratio": 0.0,
    }
    made = setting.job(MODEL, LENGTH, BATCH, BATCH, **{
        "train.optimizer": {"name": name, "lr": rate}, "train.schedule": schedule, "train.steps": steps, "train.seed": seed,
        "train.precision": "fp32", "train.zero.stage": 1})  # fmt: skip
    its = setting.recipe(made)
    engine = setting.engine(made, its)
    average, spent = ema.of(made, engine), 0.0
    for step in range(steps):
        began = time.process_time()
        deepspeed_engine.set_lr(engine, rate * factor(made.train.schedule, step, steps))
        batch = its.batch(rows(data[0], BATCH, seed * 1_000_003 + step), np.arange(BATCH))
        engine.backward(its.loss(engine, batch).sum / its.terms(batch))
        engine.step()
        spent += time.process_time() - began
        if (step + 1) % max(1, steps // LOOKS) == 0:
            with average.applied() if average else nullcontext():
                yield spent, held_out(engine, its, data[1])


@torch.no_grad()
def held_out(engine: Any, its: Any, data: np.ndarray) -> float:
    engine.eval()
    parts = [its.batch(part, np.arange(len(part))) for part in np.split(rows(data, HELD_OUT, 0), HELD_OUT // BATCH)]
    found = sum(float(its.loss(engine, part).sum) for part in parts) / sum(its.terms(part) for part in parts)
    engine.train()
    return found


def main() -> None:
    asked = harness.arguments(__doc__, steps=400, seeds=3, only=[*RATES], times=[1.0])
    torch.set_num_threads(1)
    setting.start()
    data = corpus()
    print(f"{len(data[0]):,} bytes to train on, {len(data[1]):,} held out; {asked.steps} steps of {BATCH * LENGTH:,} bytes\n")
    harness.head("optimizer", "learning rate", "held-out loss (CPU s), mean of the seeds", "at the end, by seed")
    for name in asked.only:
        for rate in [RATES[name] * times for times in asked.times]:
            runs = [list(play(name, rate, asked.steps, seed, data)) for seed in range(asked.seeds)]
            looks = ", ".join(
                f"{mean(r[i][1] for r in runs):.3f} ({mean(r[i][0] for r in runs):.0f})" for i in range(len(runs[0]))
            )
            harness.row(name, f"{rate:g}", looks, ", ".join(f"{r[-1][1]:.3f}" for r in runs))


if __name__ == "__main__":
    main()
