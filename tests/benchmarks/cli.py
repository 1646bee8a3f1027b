"""Processor time of commands until they answer, and of `heliostat train` until its first attempt begins (docs/benchmarks/cli.md).

    python tests/benchmarks/cli.py [--rounds 5]

Of the child process, in seconds, least of the rounds: the least disturbed. `check` and `train` want the dataset of
`heliostat prepare pipelines/quickstart.yaml`; without it they end with the error that names it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOB = "jobs/quickstart.yaml"
HELP, CHECK = 0.3, 1.0  # goals, seconds
CASES: dict[str, tuple[list[str], float | None]] = {
    "--version": (["--version"], HELP),
    "--help": (["--help"], HELP),
    "train --help": (["train", "--help"], None),
    "check, unknown key": (["check", JOB, "--set", "train.stpes=1"], CHECK),
    "check, batch does not divide": (["check", JOB, "--set", "train.global_batch=9"], CHECK),
    "check --offline, right": (["check", JOB, "--offline"], CHECK),
    "check, right": (["check", JOB], CHECK),
}
# ends where the first attempt would begin: the file loaded, everything checked, the run claimed, its data planned
TRAIN = """
import sys
from heliostat.training import run
def stop(self):
    raise SystemExit(0)
run.DrivenRun.run = stop
from heliostat.cli.main import main
sys.argv = ["heliostat", *sys.argv[1:]]
main()
"""


def seconds(command: list[str]) -> float:
    """Processor time of one child process."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    usage = os.wait4(process.pid, 0)[2]
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| command | processor time, s | goal |\n|---|---|---|")
    for name, (arguments, goal) in CASES.items():
        found = min(seconds([sys.executable, "-m", "heliostat", *arguments]) for _ in range(rounds))
        print(f"| `{name}` | {found:.2f} | {goal or ''} |", flush=True)
    with tempfile.TemporaryDirectory() as storage:
        given = ["train", JOB, "--set", f"storage={storage}", "--set", "name=start-up"]
        found = min(seconds([sys.executable, "-c", TRAIN, *given]) for _ in range(rounds))
        print(f"| `train`, until its first attempt | {found:.2f} | |")


if __name__ == "__main__":
    main()
