"""Tokens/s of whole heliostat runs against plain torchrun DDP with the data already in memory.

    python tests/benchmarks/train_overhead.py [--rounds 5] [--steps 12] [--precision bf16] [--precision fp32]

Same model (17M parameters), batch (4,096 tokens a step), precision and thread count (2 processes of 1 thread). The heliostat
runs have everything on: Ray Data, MLflow, evaluation and checkpoints. Runs are interleaved (plain, ZeRO-1, 2, 3, plain, ...),
each is summarised by its median step after the first two, and the medians over the rounds are compared. DDP's bf16 is
autocast over fp32 weights; DeepSpeed's is bf16 weights over fp32 masters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def job(folder: Path, steps: int, precision: str) -> Path:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "jobs/quickstart.yaml").read_text())
    raw["model"] |= {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1024}
    raw["train"] |= {"steps": steps, "global_batch": 16, "micro_batch": 8, "precision": precision, "log_every": 1}
    raw["train"]["schedule"] = {"name": "constant"}
    raw["data"].pop("lanes")
    raw["evaluate"] = {"every": steps, "samples": 16, "fraction": 0.01}
    raw["checkpoint"] = {"every": steps // 2}
    raw["storage"], raw["mlflow"]["uri"] = str(folder / "runs"), f"sqlite:///{folder}/mlflow.db"
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def plain(path: Path, steps: int) -> float:
    command = [
        BIN / "torchrun",
        "--nproc-per-node",
        "2",
        ROOT / "tests/benchmarks/yardsticks/plain_ddp.py",
        path,
        str(steps),
    ]
    return json.loads(_run(command))["tokens_per_second"]


def heliostat(path: Path, stage: int, log: Path) -> tuple[float, float, dict[str, float]]:
    """(median tokens/s of the steps after the first two, data wait, start-up split)."""
    command = [BIN / "heliostat", "train", path, "--set", f"train.zero.stage={stage}", "--overwrite", "--json"]
    result = json.loads(_run(command))
    from mlflow import MlflowClient

    uri = yaml.safe_load(path.read_text())["mlflow"]["uri"]
    history = MlflowClient(tracking_uri=uri).get_metric_history(result["run_id"], "train/tokens_per_second")
    return median(m.value for m in history if m.step > 2), result["data_wait"], result["startup"]


def _run(command: list[Any]) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", action="append")
    options = parser.parse_args()
    _run([BIN / "heliostat", "prepare", "pipelines/quickstart.yaml"])
    with tempfile.TemporaryDirectory() as name:
        for precision in options.precision or ["bf16", "fp32"]:
            path = job(Path(name), options.steps, precision)
            rates: dict[str, list[float]] = {"plain DDP": [], **{f"ZeRO-{s}": [] for s in (1, 2, 3)}}
            waits, starts = [], []
            for _ in range(options.rounds):
                rates["plain DDP"].append(plain(path, options.steps))
                for stage in (1, 2, 3):
                    rate, wait, startup = heliostat(path, stage, Path(name))
                    rates[f"ZeRO-{stage}"].append(rate)
                    waits.append(wait)
                    starts.append(startup)
            print(f"\n{precision}, {options.rounds} rounds of {options.steps} steps, 4,096 tokens a step")
            print("| | tokens/s, median (all) | ratio to plain, median of the rounds |\n|---|---|---|")
            for label, values in rates.items():
                ratio = median(v / p for v, p in zip(values, rates["plain DDP"], strict=True))
                print(f"| {label} | {median(values):,.0f} ({', '.join(f'{v:,.0f}' for v in values)}) | {ratio:.3f} |")
            split = ", ".join(f"{k.replace('_', ' ')} {median(s[k] for s in starts):.1f}" for k in starts[0])
            print(
                f"data wait: median {median(waits):.2%}, worst {max(waits):.2%}; start-up, seconds, medians: {split}", flush=True
            )


if __name__ == "__main__":
    main()
