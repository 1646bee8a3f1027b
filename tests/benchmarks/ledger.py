"""Measures the cost of the goodput ledger: microseconds per step on the worker, and per report on worker and driver.

    python -m tests.benchmarks.ledger [--steps 100000]

The worker's part is its work in every step (a switch to `data` and back, one booking of a wait for a checkpoint). At a report,
the worker sums its totals, and the driver processes the event. The goal is less than 0.5 % of a step, and a step of 10 ms is
shorter than any that is worth several workers. Each number is the median of five rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median

from heliostat.runs.events import ModelPhase, Steps
from heliostat.runs.time_ledger import Ledger, LedgerRecorder
from heliostat.storage.locations import Location

from tests.benchmarks import harness

SHORT_STEP_US = 10_000


def microseconds(work: Callable[[int], object], times: int) -> float:
    rounds = []
    for _ in range(5):
        started = time.perf_counter()
        for i in range(times):
            work(i)
        rounds.append((time.perf_counter() - started) / times * 1e6)
    return median(rounds)


def main() -> None:
    steps = harness.arguments(__doc__, steps=100_000).steps
    ledger = Ledger("computing")

    def step(_: int) -> None:
        with ledger("data"):
            pass
        ledger.move("computing", "checkpoint", 0.0)

    with tempfile.TemporaryDirectory() as folder:
        recorder = LedgerRecorder(Location(folder), time.time(), 0, 2)
        recorder.event(ModelPhase(queued_s=0.0, start_step=0, workers=2, ledger=ledger.totals()))

        def report(i: int) -> None:
            recorder.event(Steps(first=i, loss=[0.0], grad_norm=[0.0], lr=[0.0], seconds=1.0, ledger=ledger.totals()))

        each, reported = microseconds(step, steps), microseconds(report, steps // 10)
        recorder.close("finished")
    print(f"a step {each:.2f} us ({each / SHORT_STEP_US:.4%} of a step of 10 ms); a report, worker and driver, {reported:.1f} us")


if __name__ == "__main__":
    main()
