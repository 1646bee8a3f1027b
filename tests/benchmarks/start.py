"""Measures the seconds from a command to the quickstart's first finished step: cold, with a kept Ray, and on a running cluster.

    python -m tests.benchmarks.start [--rounds 5] [--job jobs/quickstart.yaml] [--kinds cold plain kept trial cluster]

Needs the dataset of `heliostat data prepare pipelines/quickstart.yaml`.

    cold      `heliostat train` as a process, by the clock of its parent
    plain     the same, if Ray starts the workers itself (HELIOSTAT_FORK_SERVER=0)
    kept      a second `heliostat.train` in a process whose first one left its private Ray
    trial     each trial except the first of a sweep that runs one at a time, from the trial's own beginning
    cluster   `heliostat submit`, by the clock of the sender

docs/benchmarks/start.md has the table, and describes the parts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from heliostat.cluster.processes import free_port

from tests.benchmarks import harness
from tests.benchmarks.harness import ROOT

STEPS = 10  # two behind the quickstart's warm-up
KINDS = {
    "cold": "cold",
    "plain": "cold, without the fork server",
    "kept": "a second run beside a kept Ray",
    "trial": "a sweep's next trial",
    "cluster": "on a running cluster",
}
SETTLE_S = 15.0  # for what a cluster does by itself after a start, or a job
KEPT = """
import json, sys
import heliostat
path, settings = sys.argv[1], json.loads(sys.argv[2])
for number in range(2):
    heliostat.train(heliostat.load_job(path, settings | {"name": f"kept-{number}"}))
"""


def settings(folder: str, name: str) -> dict[str, Any]:
    return {"name": name, "storage": folder, "train.steps": STEPS, "checkpoint.every": STEPS, "evaluate": None,
            "mlflow.register": None, "mlflow.uri": f"sqlite:///{folder}/mlflow.db"}  # fmt: skip


def told(parts: dict[str, float]) -> dict[str, float]:
    """Prints how a start went; returns it."""
    print(json.dumps(parts), file=sys.stderr, flush=True)
    return parts


def cold(job: str, folder: str, name: str, forks: bool = True) -> dict[str, float]:
    """Trains in a new process; returns the seconds until its first step, by part."""
    command = [sys.executable, "-m", "heliostat", "train", job, "--json", *harness.sets(settings(folder, name))]
    began = time.time()
    environment = {**os.environ, "HELIOSTAT_FORK_SERVER": str(int(forks))}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    first = next(time.time() - began for line in process.stderr if " step 1/" in line)
    said, _ = process.communicate(timeout=300)
    return told({"command to first step": first, **json.loads(said.splitlines()[-1])["startup"]})


def kept(job: str, folder: str) -> dict[str, float]:
    """Trains twice in a new process; returns the seconds until the second run's first step, by part."""
    harness.process([sys.executable, "-c", KEPT, job, json.dumps(settings(folder, ""))])
    result = json.loads((Path(folder) / "kept-1/result.json").read_text())
    return told({"command to first step": result["seconds_to_first_step"], **result["startup"]})


def trials(job: str, folder: str, rounds: int) -> list[dict[str, float]]:
    """Runs a sweep of one trial after another; returns the seconds until the first step of each except the first, by part."""
    sweep = {"name": "sweep", "job": str(ROOT / job), "searcher": {"name": "grid"}, "concurrency": 1, "register_best": False}
    sweep["set"] = {key: value for key, value in settings(folder, "").items() if key not in ("name", "evaluate")}
    sweep["set"]["evaluate.every"] = STEPS  # a sweep compares what it scores
    sweep["space"] = {"train.seed": {"grid": list(range(rounds + 1))}}
    file = Path(folder) / "sweep.yaml"
    file.write_text(json.dumps(sweep))
    harness.heliostat("sweep", "run", file)
    results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("sweep/trials/*/summary.json"))[1:]]
    return [told({"command to first step": one["seconds_to_first_step"], **one["startup"]}) for one in results]


@contextlib.contextmanager
def cluster(folder: str) -> Iterator[str]:
    """Runs a cluster of this machine while the context lasts, on its own ports; yields its file."""
    text = (ROOT / "clusters/local.yaml").read_text().replace("cluster_name: local", "cluster_name: start")
    for port in ("6389", "6390", "8275"):
        text = text.replace(port, str(free_port()))
    file = Path(folder) / "cluster.yaml"
    file.write_text(text)
    harness.heliostat("cluster", "up", file)
    try:
        time.sleep(SETTLE_S)
        yield str(file)
    finally:
        harness.heliostat("cluster", "down", file)


def submitted(job: str, folder: str, file: str, number: int) -> dict[str, float]:
    """Submits a job to the cluster; returns the seconds until its first step, and the parts that its driver reports."""
    given = harness.sets(settings(folder, f"submitted-{number}"))
    command = [sys.executable, "-m", "heliostat", "submit", job, "--cluster", file, "--follow", *given]
    began = time.time()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    first = next(time.time() - began for line in process.stdout if " step 1/" in line)
    process.communicate(timeout=300)
    result = json.loads((Path(folder) / f"submitted-{number}/result.json").read_text())
    time.sleep(SETTLE_S)
    return told({"command to first step": first, **result["startup"]})


def main() -> None:
    options = harness.arguments(__doc__, rounds=5, job="jobs/quickstart.yaml", kinds=[*KINDS])
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.kinds}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            if "cold" in found:
                found["cold"].append(cold(options.job, folder, f"cold-{number}"))
            if "plain" in found:
                found["plain"].append(cold(options.job, folder, f"plain-{number}", forks=False))
            if "kept" in found:
                found["kept"].append(kept(options.job, folder))
    if "trial" in found:
        with tempfile.TemporaryDirectory() as folder:
            found["trial"] = trials(options.job, folder, options.rounds)
    if "cluster" in found:
        with tempfile.TemporaryDirectory() as folder, cluster(folder) as file:
            found["cluster"] = [submitted(options.job, folder, file, number) for number in range(options.rounds + 1)][1:]
    parts = list(next(iter(found.values()))[0])
    harness.head(f"start, medians of {options.rounds}, s", *(part.replace("_", " ") for part in parts))
    for name, rounds in found.items():
        harness.row(KINDS[name], *(f"{median(one[part] for one in rounds):.2f}" for part in parts))


if __name__ == "__main__":
    main()
