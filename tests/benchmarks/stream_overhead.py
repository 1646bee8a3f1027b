"""Compares steps per second of one loop over the exact stream and over a bare loader, interleaved.

    python -m tests.benchmarks.stream_overhead [--pairs 40] [--turn 5]

All processes of one contender are stopped while the other trains (yardsticks/turns.py). A step has 1,024 tokens and takes a fifth
of a second here, less than a step of a real model, so the cost of a batch is a larger share of it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.benchmarks import harness
from tests.benchmarks.yardsticks import turns

STEPS = 1_000_000  # more than both train


def main() -> None:
    options = harness.arguments(__doc__, pairs=40, turn=5.0)
    harness.heliostat("data", "prepare", "pipelines/quickstart.yaml")
    data = harness.ROOT / ".heliostat/data/quickstart"
    with tempfile.TemporaryDirectory() as name:
        both = {}
        for kind in ("exact", "bare"):
            folder = Path(name) / kind
            folder.mkdir()
            command = [sys.executable, "-m", "tests.benchmarks.yardsticks.one_loop", kind, data, folder, STEPS]
            both[kind] = turns.Contender(command, folder / "log", lambda text: text.count(turns.MARK) > 20)
        for _ in range(options.pairs):
            for contender in both.values():
                contender.turn(options.turn)
        paces = [turns.paces(one, turns.printed(one.output.read_text())) for one in both.values()]
        for contender in both.values():
            contender.end()
    harness.head("steps/s", *turns.HEADS)
    pairs = [(1 / a, 1 / b) for a, b in zip(*paces, strict=True) if a and b]
    harness.row("exact stream", *turns.Outcome([a for a, _ in pairs], [b for _, b in pairs], {}).cells)


if __name__ == "__main__":
    main()
