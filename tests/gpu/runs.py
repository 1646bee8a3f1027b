"""Trains whole runs on Ray: a profile, a killed worker, another number of workers, and the tests of this folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu import setting
from tests.gpu.correctness import apart

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 40, 5
SAME = 1e-4  # relative, of losses on another number of workers: sums in another order, in fp32
Row = dict[str, Any]


def job_file(folder: Path, workers: int, **changes: Any) -> Path:
    """Writes a job of a tiny model on generated tokens. Each step takes 0.3 s, which leaves time for faults."""
    from tests.golden import data
    from tests.unit import build_job

    if not (folder / "data").exists():
        data.tokens(folder / "data")
    given = {
        "recipe": "tests.integration.paced:Paced", "data.sources": [{"path": str(folder / "data")}], "data.virtual_ranks": 4,
        "storage": str(folder / "runs"), "mlflow": {"uri": f"sqlite:///{folder}/mlflow.db", "experiment": "gpu"},
        "train.steps": STEPS, "train.micro_batch_size": 2, "train.precision": "fp32", "train.zero.stage": 2, "train.log_every": 1,
        "train.optimizer.eps": 1e-4, "evaluate": None, "checkpoint.every": EVERY, "retries": {"max": 3, "backoff": 0.5},
        "workers": {"count": workers, "gpus": int(setting.GPU)},
    }  # fmt: skip
    return build_job.write(folder, **given | changes)


def heliostat(*words: str) -> dict[str, Any]:
    """Runs a command to its end; returns its report. RuntimeError with its last line if it fails."""
    done = subprocess.run(_command(*words), capture_output=True, text=True, cwd=ROOT, check=False)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise RuntimeError(f"heliostat {words[0]}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "heliostat", *words, "--json"]


def _row(what: str, value: float, unit: str, problem: str = "") -> Row:
    return {"kind": "run", "what": what, "value": value, "unit": unit, "ok": not problem, "problem": problem}


def profile() -> Iterator[Row]:
    """Profiles steps of a running job: the trace has kernels and the parts of a step, and memory is recorded."""
    from heliostat.runs import profile as profiles
    from heliostat.runs import profile_table
    from heliostat.storage.locations import Location

    with tempfile.TemporaryDirectory() as name:
        path, run = job_file(Path(name), 1, **{"train.steps": 400}), Location(f"{name}/runs/small")
        with subprocess.Popen(_command("train", str(path)), cwd=ROOT, stdout=subprocess.DEVNULL) as driver:
            try:
                while not run.join("ledger").files():
                    if driver.poll() is not None:
                        raise RuntimeError(f"heliostat train: ended with {driver.returncode} before its first step")
                    time.sleep(0.2)
                result = heliostat("debug", "profile", str(run.path), "--steps", "3")
            finally:
                if driver.poll() is None:
                    driver.terminate()  # saves, and ends
                driver.wait()
        device, folder = "gpu" if setting.GPU else "cpu", Location(result["folder"])
        wrong = "" if result["device"] == device else f"the trace is of the {result['device']}"
        yield _row("steps profiled", result["steps"], "steps", wrong)
        yield _row("time in which the device computes", 100 * result["busy"], "%", "" if result["busy"] else "it never does")
        memory = [folder.join(file).info() for file in result["files"] if file.endswith(profiles.MEMORY)]
        size = sum(one.size for one in memory if one)
        yield _row("memory snapshot", size / 1e6, "MB", "no memory snapshot" if setting.GPU and not size else "")
        traces = [file for file in result["files"] if file.endswith(profiles.TRACE)]
        busiest = profile_table.read(folder.join(traces[0]))["operations"][0]
        yield _row(f"busiest operation: {busiest['name'][:60]}", 1e3 * busiest["self_s"], "ms")


def kill_worker() -> Iterator[Row]:
    """Kills one of two workers: the other one aborts its collective, and the loss is the unbroken run's."""
    from heliostat.chaos.experiment import chaos

    with tempfile.TemporaryDirectory() as name:
        (row,), wrong = chaos(job_file(Path(name), 2), ["kill-worker"], work=Path(name) / "chaos")
        yield _row("recovery from a killed worker", row["recovered_s"] or 0.0, "s", "; ".join(wrong))


def elastic() -> Iterator[Row]:
    """Trains on 2 workers, resumes on 1, and on 2 again: the losses equal those of one run on 2."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = job_file(folder, 2)
        third, settings = STEPS // 3 // EVERY * EVERY, ["--set", "train.schedule={name: constant}"]
        for number, workers in enumerate((2, 1, 2), 1):
            steps = str(third * number if number < 3 else STEPS)
            words = ["--set", f"workers.count={workers}", "--set", f"train.steps={steps}"]
            heliostat("train", str(path), *settings, *words, *(["--resume"] if number > 1 else []))
        heliostat("train", str(path), *settings, "--set", "name=unbroken")
        found, right = losses(folder, "small"), losses(folder, "unbroken")
        missing = "" if len(found) == len(right) == STEPS else f"{len(found)} steps, not {STEPS}"
        far = 0.0 if missing else apart(found, right)
        wrong = missing or (f"the losses are {far:.2g} from the unbroken run's" if far > SAME else "")
        yield _row("losses on 2, 1, and 2 workers, from those on 2", far, f"of {SAME}", wrong)
        report = heliostat("run", "verify", str(folder / "runs/small"))
        yield _row(
            "samples lost or repeated",
            report["lost"] + report["repeated"],
            "samples",
            "" if report["ok"] else "the receipts differ",
        )


def losses(folder: Path, name: str) -> list[float]:
    """Returns the losses of a run's steps in MLflow, in order."""
    from mlflow import MlflowClient

    run_id = json.loads((folder / "runs" / name / "run.json").read_text())["run_id"]
    history = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db").get_metric_history(run_id, "train/loss")
    return [value for _, value in sorted((m.step, m.value) for m in history)]


def pytest(file: str) -> Iterator[Row]:
    """Runs a file of tests of this folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/{file}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    sys.stderr.write(done.stdout + done.stderr)
    passed = re.search(r"(\d+) passed", done.stdout)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    problem = failed[0] if failed else f"pytest ended with {done.returncode}" if done.returncode else ""
    yield _row(file, int(passed[1]) if passed else 0, "tests passed", problem)
