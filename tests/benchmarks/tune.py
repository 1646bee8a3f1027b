"""Measures the cost of a sweep: ASHA against the grid on the quickstart, and a trial against the same job trained directly.

    python -m tests.benchmarks.tune [--steps 80] [--trials 8] [--rounds 3] [--only asha|overhead]

ASHA and the grid get the same learning rates, evenly spaced in the logarithm. The comparison is by the best held-out loss and the
number of steps. A trial's overhead is its wall-clock time from its start by the sweep to its end, minus that of `heliostat train`
for the job, which also exports and registers a model. Both start new workers. Runs are interleaved, and medians are compared.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from tests.benchmarks import harness


def sweep(folder: Path, name: str, steps: int, rates: list[float], scheduler: dict[str, Any]) -> Path:
    every = steps // 8
    fixed = {
        "train.steps": steps,
        "train.schedule.warmup_steps": every,
        "evaluate.every": every,
        "evaluate.samples": 64,
        "checkpoint.every": steps,
        "storage": str(folder / "runs"),
        "mlflow.uri": f"sqlite:///{folder}/mlflow.db",
        "mlflow.register": None,
    }
    raw = {
        "name": name,
        "job": str(harness.ROOT / "jobs/quickstart.yaml"),
        "set": fixed,
        "space": {"train.optimizer.lr": {"grid": rates}},
        "searcher": {"name": "grid"},
        "scheduler": scheduler,
        "register_best": False,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def asha(folder: Path, steps: int, trials: int) -> None:
    """Compares ASHA with the grid. The order of trials is that of a random search, because a grid in ascending order would give
    ASHA too little or too much information."""
    rates = [float(f"{r:.3g}") for r in np.geomspace(1e-4, 3e-2, trials)]
    rates = [rates[i] for i in np.random.default_rng(0).permutation(trials)]
    asked = {"name": "asha", "grace": steps // 8, "reduction": 2}
    found = {
        "grid": harness.heliostat("sweep", "run", sweep(folder, "grid", steps, rates, {"name": "none"})),
        "ASHA": harness.heliostat("sweep", "run", sweep(folder, "asha", steps, rates, asked)),
    }
    print(f"\nthe quickstart, {steps} steps, {trials} trials of 2 workers\n")
    harness.head("", "best lr", "its held-out loss", "steps", "share", "seconds")
    for name, result in found.items():
        best, share = result["best"], result["steps"] / found["grid"]["steps"]
        lr = best["params"]["train.optimizer.lr"]
        harness.row(name, f"{lr:.3g}", f"{best['value']:.4f}", result["steps"], f"{share:.0%}", f"{result['seconds']:.0f}")
    print(f"\nASHA's best is {found['ASHA']['best']['value'] / found['grid']['best']['value'] - 1:+.2%} off the grid's")


def overhead(folder: Path, steps: int, rounds: int) -> None:
    direct, trial, first = [], [], []
    for i in range(rounds):
        path = sweep(folder, f"one{i}", steps, [2e-3], {"name": "none"})
        result = harness.heliostat("sweep", "run", path)
        trial.append(result["trials"][0]["seconds"])
        started = json.loads((Path(result["best"]["run_folder"]) / "summary.json").read_text())
        fixed = yaml.safe_load(path.read_text())["set"]
        began = time.time()
        alone = harness.heliostat("train", "jobs/quickstart.yaml", *harness.sets({**fixed, "name": f"direct{i}"}))
        direct.append(time.time() - began)
        first.append((started["seconds_to_first_step"], alone["seconds_to_first_step"]))
    over = median(t - d for t, d in zip(trial, direct, strict=True))
    print(f"\na trial of {steps} steps, {rounds} rounds, medians\n")
    harness.head("", "seconds", "to the first step")
    harness.row("as a trial", f"{median(trial):.1f}", f"{median(a for a, _ in first):.1f}")
    harness.row("`heliostat train`", f"{median(direct):.1f}", f"{median(b for _, b in first):.1f}")
    print(f"\noverhead of a trial: {over:+.1f} s, {over / median(direct):+.0%}")


def main() -> None:
    options = harness.arguments(__doc__, steps=80, trials=8, rounds=3, only=["asha", "overhead"])
    harness.heliostat("data", "prepare", "pipelines/quickstart.yaml")
    with tempfile.TemporaryDirectory() as name:
        if "asha" in options.only:
            asha(Path(name), options.steps, options.trials)
        if "overhead" in options.only:
            overhead(Path(name), options.steps, options.rounds)


if __name__ == "__main__":
    main()
