"""Runs a plain training loop and a whole heliostat run, interleaved on the same cores.

One is stopped (SIGSTOP, with all its processes) while the other runs. The speed of a shared machine changes by a tenth within a
minute, so consecutive runs differ by more than the measured effect. Turns of some seconds meet the same machine. The plain loop
writes a line for every step (`Step.tell`); heliostat's steps are in MLflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
import yaml

from tests.benchmarks import harness

BIN = Path(sys.executable).parent
START_S = 300.0
MARK = "step ended "


class Step(NamedTuple):
    """Describes a training step: its end (Unix time), and its seconds."""

    at: float
    seconds: float

    def tell(self) -> None:
        sys.stdout.write(f"{MARK}{json.dumps(self)}\n")
        sys.stdout.flush()


class Contender:
    """Runs a command that trains. `begun` gets its output so far, and returns whether its first steps have ended."""

    def __init__(self, command: list[Any], output: Path, begun: Callable[[str], bool]) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT)}
        self.output = output
        with output.open("w") as out:
            self.process = subprocess.Popen([str(c) for c in command], cwd=harness.ROOT, env=env, stdout=out, stderr=out)
        self.turns: list[tuple[float, float]] = []
        deadline = time.time() + START_S
        while not begun(output.read_text()):
            if self.ended or time.time() > deadline:
                self.fail()
            time.sleep(0.1)
        self.stop()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def turn(self, seconds: float) -> None:
        self._signal(signal.SIGCONT)
        began = time.time()
        while time.time() < began + seconds and not self.ended:
            time.sleep(0.1)
        self.turns.append((began, time.time()))
        self.stop()

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def fail(self) -> None:
        self.end()
        sys.exit(self.output.read_text()[-3000:])

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        known: set[int] = set()
        while not self.ended:
            root = psutil.Process(self.process.pid)
            new = [p for p in (root, *root.children(recursive=True)) if p.pid not in known]
            if not new:
                return
            for process in new:
                known.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


class Outcome(NamedTuple):
    """Holds the training rates, turn by turn, and heliostat's result."""

    plain: list[float]
    ours: list[float]
    result: dict[str, Any]

    @property
    def cells(self) -> tuple[str, str, str, int]:
        """Formats the cells below HEADS."""
        ratios = [a / b for a, b in zip(self.ours, self.plain, strict=True)]
        return f"{median(self.ours):,.4g}", f"{median(self.plain):,.4g}", harness.spread(ratios), len(ratios)


HEADS = ("ours", "plain", "ratio: median of the pairs of turns (minimum to maximum)", "pairs")


def compare(yardstick: str, more: list[Any], job: Path, stage: int, seconds: float) -> Outcome:
    """Trains the job with the plain loop of this name and with heliostat, on two workers, interleaved until heliostat has
    ended."""
    plain = [BIN / "torchrun", "--nproc-per-node", "2", "--module", f"tests.benchmarks.yardsticks.{yardstick}", job, *more]
    ours = [BIN / "heliostat", "train", job, "--set", f"train.zero.stage={stage}", "--overwrite", "--json"]
    raw = yaml.safe_load(job.read_text())
    size = raw["train"]["global_batch_size"] * (raw["data"].get("sequence_length") or 1)
    logs = job.with_name("plain.log"), job.with_name("heliostat.log")
    second = Contender(plain, logs[0], lambda text: len(printed(text)) > 2)
    first = Contender(ours, logs[1], lambda text: " step 3/" in text)
    while not first.ended:
        first.turn(seconds)
        second.turn(seconds)
        if second.ended:
            second.fail()
    if first.process.returncode:
        second.end()
        first.fail()
    second.end()
    result = json.loads(logs[1].read_text().splitlines()[-1])
    both_paces = paces(first, _logged(result["run_id"], raw["mlflow"]["uri"], size)), paces(second, printed(logs[0].read_text()))
    both = [(a, b) for a, b in zip(*both_paces, strict=True) if a and b]
    return Outcome([size / b for _, b in both], [size / a for a, _ in both], result)


def printed(text: str) -> list[Step]:
    whole = text[: text.rfind("\n") + 1]
    return [Step(*json.loads(line.removeprefix(MARK))) for line in whole.splitlines() if line.startswith(MARK)]


def _logged(run_id: str, uri: str, size: int) -> list[Step]:
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=uri).get_metric_history(run_id, "train/tokens_per_second")
    return [Step(m.timestamp / 1000, size / m.value) for m in history]


def paces(contender: Contender, steps: list[Step]) -> list[float | None]:
    """Returns the mean seconds of the complete steps in each turn, or None if there were fewer than two."""
    out: list[float | None] = []
    for began, ended in contender.turns:
        inside = [s.seconds for s in steps if began <= s.at - s.seconds and s.at <= ended]
        out.append(sum(inside) / len(inside) if len(inside) > 1 else None)
    return out
