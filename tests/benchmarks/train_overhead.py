"""Compares tokens/s of whole heliostat runs with plain torchrun DDP with the data already in memory.

    python -m tests.benchmarks.train_overhead [--steps 60] [--turn 12] [--stages 1 2 3] [--precision bf16 fp32]

Both have the same model (17M parameters), batch (4,096 tokens per step), precision, and thread count (2 processes of 1 thread).
The heliostat runs have everything on: Ray Data, MLflow (a line per step), evaluation, and checkpoints. The two take turns of some
seconds, while all processes of the other are stopped (see yardsticks/turns.py). Each pair of turns gives a ratio of the steps in
them. DDP's bf16 is autocast over fp32 weights; DeepSpeed's is bf16 weights over fp32 master weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tests.benchmarks import harness
from tests.benchmarks.yardsticks import turns

LLAMA = {"arch": "llama", "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 1024, "vocab_size": 4096}  # fmt: skip


def job(folder: Path, steps: int, precision: str) -> Path:
    raw: dict[str, Any] = yaml.safe_load((harness.ROOT / "jobs/quickstart.yaml").read_text())
    raw["model"] = LLAMA
    raw["train"] |= {"steps": steps, "global_batch_size": 32, "micro_batch_size": 16, "precision": precision, "log_every": 1}
    raw["train"]["optimizer"] = {"name": "adamw", "lr": 2e-3}
    raw["train"]["schedule"] = {"name": "constant"}
    raw["data"].pop("virtual_ranks")
    raw["evaluate"] = {"every": steps // 2, "samples": 32, "fraction": 0.01}
    raw["checkpoint"] = {"every": steps // 3}
    raw["watchdog"] = {"stall": 3600}  # it stands still between its turns
    raw["storage"], raw["mlflow"]["uri"] = str(folder / "runs"), f"sqlite:///{folder}/mlflow.db"
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def main() -> None:
    options = harness.arguments(__doc__, steps=60, turn=12.0, stages=[1, 2, 3], precision=["bf16", "fp32"])
    harness.heliostat("data", "prepare", "pipelines/quickstart.yaml")
    with tempfile.TemporaryDirectory() as name:
        for precision in options.precision:
            path = job(Path(name), options.steps, precision)
            print(f"\n{precision}, {options.steps} steps of 4,096 tokens, turns of {options.turn:g} s")
            harness.head("tokens/s", *turns.HEADS, "data wait")
            starts = []
            for stage in options.stages:
                outcome = turns.compare("plain_ddp", [500], path, stage, options.turn)
                harness.row(f"ZeRO-{stage}", *outcome.cells, f"{outcome.result['data_wait']:.2%}")
                starts.append(outcome.result["startup"])
            split = ", ".join(f"{k.replace('_', ' ')} {median(s[k] for s in starts):.1f}" for k in starts[0])
            print(f"start-up, seconds, medians: {split}", flush=True)


if __name__ == "__main__":
    main()
