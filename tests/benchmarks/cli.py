"""Measures the CPU time of commands until they answer, and of `heliostat train` until its first attempt (docs/benchmarks/cli.md).

    python -m tests.benchmarks.cli [--rounds 5]

The time is that of the child process in seconds, in the least disturbed round. `check` and `train` need the dataset of `heliostat
data prepare pipelines/quickstart.yaml`; without it, they end with the error that names it.
"""

from __future__ import annotations

import sys
import tempfile

from tests.benchmarks import harness

JOB = "jobs/quickstart.yaml"
HELP, CHECK = 0.3, 1.0  # goals, seconds
CASES: dict[str, tuple[list[str], float | None]] = {
    "--version": (["--version"], HELP),
    "--help": (["--help"], HELP),
    "no command": ([], None),
    "train --help": (["train", "--help"], None),
    "check, unknown key": (["check", JOB, "--set", "train.stpes=1"], CHECK),
    "check, batch does not divide": (["check", JOB, "--set", "train.global_batch_size=9"], CHECK),
    "check, unknown architecture": (["check", JOB, "--set", "model.arch=lama"], None),
    "check, no dataset": (["check", JOB, "--set", "data.sources.0.path=nothing"], CHECK),
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


def least(rounds: int, *command: str) -> str:
    return f"{min(harness.process([sys.executable, *command], may_fail=True).cpu for _ in range(rounds)):.2f}"


def main() -> None:
    rounds = harness.arguments(__doc__, rounds=5).rounds
    harness.head("command", "processor time, s", "goal")
    for name, (arguments, goal) in CASES.items():
        harness.row(f"`{name}`", least(rounds, "-m", "heliostat", *arguments), goal or "")
    with tempfile.TemporaryDirectory() as storage:
        given = ["train", JOB, "--set", f"storage={storage}", "--set", "name=start-up"]
        harness.row("`train`, until its first attempt", least(rounds, "-c", TRAIN, *given), "")


if __name__ == "__main__":
    main()
