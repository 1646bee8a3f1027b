"""Two programs that train, by turns on the same cores.

One stands still (SIGSTOP, with all that it has started) while the other runs. The speed of a shared machine changes by a
tenth within a minute, so that runs one after the other differ by more than what is to be measured; turns of some seconds
meet the same machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[3]
START_S = 300.0


class Step(NamedTuple):
    """A training step: when it ended (Unix time), and how many seconds it took."""

    at: float
    seconds: float


class Contender:
    """A command that trains. `begun` is given what it has written so far, and says whether its first steps are over."""

    def __init__(self, command: list[Any], output: Path, begun: Callable[[str], bool]) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}"}
        self.output = output
        with output.open("w") as out:
            self.process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=env, stdout=out, stderr=out)
        self.turns: list[tuple[float, float]] = []
        deadline = time.time() + START_S
        while not begun(output.read_text()):
            if self.ended or time.time() > deadline:
                self.end()
                sys.exit(output.read_text()[-3000:])
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


def play(first: Contender, second: Contender, seconds: float) -> None:
    """Gives each its turn until the first has ended; the second is ended then."""
    while not first.ended:
        first.turn(seconds)
        second.turn(seconds)
    second.end()


def paces(contender: Contender, steps: Iterable[Step]) -> list[float | None]:
    """For each turn the mean seconds of the steps that lay in it as a whole, or None where there were fewer than two."""
    out: list[float | None] = []
    for began, ended in contender.turns:
        inside = [s.seconds for s in steps if began <= s.at - s.seconds and s.at <= ended]
        out.append(sum(inside) / len(inside) if len(inside) > 1 else None)
    return out


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} turns)"
