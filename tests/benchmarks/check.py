"""Seconds from the command to the answer of `heliostat check`, for a right job and for wrong ones.

    python tests/benchmarks/check.py [--rounds 5]

The goal is under 5 seconds. Wall clock and processor time, medians; a right job is checked with its dataset and stores if
`heliostat prepare pipelines/quickstart.yaml` has been run.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "right": [],
    "right, offline": ["--offline"],
    "unknown key": ["--set", "train.stpes=1"],
    "batch does not divide": ["--set", "train.global_batch=9"],
    "unknown architecture": ["--set", "model.arch=lama"],
    "no dataset": ["--set", "data.sources.0.path=nothing"],
}


def seconds(options: list[str]) -> tuple[float, float]:
    """(wall clock, processor time) of one check."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [str(Path(sys.executable).parent / "heliostat"), "check", "jobs/quickstart.yaml", *options]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| job | wall clock, s | processor time, s |\n|---|---|---|")
    for name, options in CASES.items():
        found = [seconds(options) for _ in range(rounds)]
        print(f"| {name} | {median(w for w, _ in found):.1f} | {median(p for _, p in found):.1f} |")


if __name__ == "__main__":
    main()
