"""Measures what tracking costs a run, and what an outage of MLflow costs it.

    python -m tests.benchmarks.tracking [--seconds 30] [--steps 10000] [--away 10]

1. A loop of 20 steps per second posts every step's loss, learning rate, and gradient norm, like a driver with
   `train.log_every: 1`. Measures the time of `post` per step (the goal is below 1 % of a step, 0.5 ms), and the writing thread's
   share of the process's CPU time, which workers don't share.
2. So many steps are posted to a server that is killed in the middle and restarts some seconds later. All of them must be in
   MLflow once, and in order.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from heliostat.chaos.servers import ServerProcess, mlflow_server
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.runs.events import Steps
from heliostat.runs.goodput import PARTS
from heliostat.tracking.logger import RunOwner
from mlflow import MlflowClient

from tests.benchmarks import harness

RATE = 20


def job(folder: Path, name: str, uri: str) -> Job:
    return Job.model_validate(
        {
            "name": name, "recipe": "heliostat.recipes:CausalLM", "model": {"arch": "llama"}, "storage": str(folder / "runs"),
            "data": {"sources": [{"path": str(folder / "none")}], "sequence_length": 64},
            "train": {"steps": 1_000_000, "global_batch_size": 8, "micro_batch_size": 8, "optimizer": {"lr": 1e-3}},
            "checkpoint": {"every": 1000}, "mlflow": {"uri": uri, "experiment": "benchmark"},
        }
    )  # fmt: skip


class Unlogged(RunOwner):
    """Simulates a run without datasets: only its curves are measured."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, list[Manifest]())
        self.job.data.sources.clear()


def event(first: int, count: int) -> Steps:
    values = [5.0 / (first + i + 1) for i in range(count)]
    return Steps(first=first, loss=values, lr=values, grad_norm=values, seconds=count / RATE, tokens_per_second=1e4,
                 data_wait=0.0, bad_samples=0, sources={"data": {"tokens": 1.0, "samples": 1.0, "epochs": 0.1}})  # fmt: skip


def finish(owner: RunOwner, steps: int) -> None:
    attempt = {"parts": dict.fromkeys(PARTS, 1.0), "before": {}, "reached": steps, "start_step": 0, "workers": 1, "seconds": 1.0,
               "started": time.time(), "outcome": "finished", "reason": "", "restart": False}  # fmt: skip
    report = {"total_s": 1.0, "parts": dict.fromkeys(PARTS, 1.0), "goodput": 1.0, "worker_hours": 0.0, "attempts": [attempt]}
    owner.finish("FINISHED", "", report)


def cost(folder: Path, uri: str, seconds: float) -> None:
    owner = Unlogged(job(folder, "cost", uri))
    steps, kept, began, cpu = int(seconds * RATE), [], time.perf_counter(), time.process_time()
    for step in range(steps):
        time.sleep(max(0.0, began + step / RATE - time.perf_counter()))
        before = time.perf_counter()
        owner.post(event(step, 1))
        kept.append(time.perf_counter() - before)
    cpu = time.process_time() - cpu
    finish(owner, steps)
    worst = sorted(kept)[int(0.99 * steps)]
    harness.row(f"{RATE} steps/s for {seconds:.0f} s", f"{median(kept) * 1e6:.0f} µs", f"{worst * 1e6:.0f} µs",
                f"{sum(kept) / steps * RATE:.3%}", f"{cpu / seconds:.1%}")  # fmt: skip


def outage(folder: Path, server: ServerProcess, tracking: str, steps: int, away: float) -> bool:
    owner = Unlogged(job(folder, "outage", f"http://{server.endpoint}"))
    began = time.perf_counter()
    for first in range(0, steps, 10):
        owner.post(event(first, 10))
        if first == steps // 3:
            while not owner.run_id:  # the run is open, and being written
                time.sleep(0.05)
            server.stop()
            down = time.perf_counter()
        if first == 2 * steps // 3:
            time.sleep(max(0.0, down + away - time.perf_counter()))
            server.start()
    posted = time.perf_counter() - began
    finish(owner, steps)
    history = MlflowClient(tracking_uri=tracking).get_metric_history(owner.run_id, "train/loss")
    whole = sorted(m.step for m in history) == list(range(1, steps + 1))
    print(f"\n{steps:,} steps, the server killed for {away:.0f} s and more in their middle: {len(history):,} losses in MLflow, "
          f"{'each step once' if whole else 'STEPS ARE MISSING OR TWICE'}; posted in {posted:.1f} s, all written "
          f"{time.perf_counter() - began - posted:.1f} s later")  # fmt: skip
    return whole


def main() -> int:
    given = harness.arguments(__doc__, seconds=30.0, steps=10_000, away=10.0)
    with tempfile.TemporaryDirectory(prefix="heliostat-tracking-") as name:
        folder = Path(name)
        tracking = f"sqlite:///{folder}/mlflow.db"
        with mlflow_server(tracking, folder) as server:
            harness.head("load", "`post`, median", "99th percentile", "share of a step", "driver's processor")
            cost(folder, f"http://{server.endpoint}", given.seconds)
            return 0 if outage(folder, server, tracking, given.steps, given.away) else 1


if __name__ == "__main__":
    sys.exit(main())
