"""Tokens/s of whole heliostat runs against plain torchrun DDP with the data already in memory.

    python tests/benchmarks/train_overhead.py [--steps 60] [--turn 12] [--stages 1 2 3] [--precision bf16] [--precision fp32]

Same model (17M parameters), batch (4,096 tokens a step), precision and thread count (2 processes of 1 thread). The heliostat
runs have everything on: Ray Data, MLflow (a line every step), evaluation and checkpoints. The two train by turns of some
seconds, all processes of the other stopped (see yardsticks/turns.py); each pair of turns gives a ratio, of the steps that lie
in them. DDP's bf16 is autocast over fp32 weights; DeepSpeed's is bf16 weights over fp32 masters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from tests.benchmarks.yardsticks import turns  # noqa: E402

LLAMA = {"arch": "llama", "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 1024, "vocab_size": 4096}  # fmt: skip


def job(folder: Path, steps: int, precision: str) -> Path:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "jobs/quickstart.yaml").read_text())
    raw["model"] = LLAMA
    raw["train"] |= {"steps": steps, "global_batch": 16, "micro_batch": 8, "precision": precision, "log_every": 1}
    raw["train"]["optimizer"] = {"name": "adamw", "lr": 2e-3}
    raw["train"]["schedule"] = {"name": "constant"}
    raw["data"].pop("lanes")
    raw["evaluate"] = {"every": steps // 2, "samples": 16, "fraction": 0.01}
    raw["checkpoint"] = {"every": steps // 3}
    raw["watchdog"] = {"stall": 3600}  # it stands still between its turns
    raw["storage"], raw["mlflow"]["uri"] = str(folder / "runs"), f"sqlite:///{folder}/mlflow.db"
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def compare(path: Path, stage: int, seconds: float) -> turns.Outcome:
    plain = [BIN / "torchrun", "--nproc-per-node", "2", ROOT / "tests/benchmarks/yardsticks/plain_ddp.py", path, 500]
    ours = [BIN / "heliostat", "train", path, "--set", f"train.zero.stage={stage}", "--overwrite", "--json"]
    return turns.compare(plain, ours, path, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turn", type=float, default=12.0)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precision", action="append")
    options = parser.parse_args()
    subprocess.run([BIN / "heliostat", "prepare", "pipelines/quickstart.yaml"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as name:
        for precision in options.precision or ["bf16", "fp32"]:
            path = job(Path(name), options.steps, precision)
            print(f"\n{precision}, {options.steps} steps of 4,096 tokens, turns of {options.turn:g} s")
            print(f"| tokens/s | {turns.ROW} | data wait |\n|---|---|---|---|---|")
            starts = []
            for stage in options.stages:
                outcome = compare(path, stage, options.turn)
                print(f"| ZeRO-{stage} | {outcome.row} | {outcome.result['data_wait']:.2%} |", flush=True)
                starts.append(outcome.result["startup"])
            split = ", ".join(f"{k.replace('_', ' ')} {median(s[k] for s in starts):.1f}" for k in starts[0])
            print(f"start-up, seconds, medians: {split}", flush=True)


if __name__ == "__main__":
    main()
