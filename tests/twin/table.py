"""Prints what crosses between the host and the device in a step: `python -m tests.twin.table`."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.integration import ranks
from tests.twin import cases
from tests.twin.steps import Setup

STAGES = [Setup("language model", stage, precision="bf16" if stage else "fp32") for stage in range(4)]
OFFLOADED = [dataclasses.replace(setup, offload=True) for setup in STAGES[1:]]
RECIPES = [Setup(case, 2, precision="bf16") for case in cases.CASES if case != "language model"]
COLUMNS = {
    "host reads": ("read",), "deferred reads": ("deferred read",), "synchronizations": ("synchronization",),
    "pinned uploads": ("upload",), "other uploads": ("blocking upload", "unpinned upload"),
}  # fmt: skip


def rows(setups: list[Setup]) -> list[dict[str, Any]]:
    """What crosses in the second step of each setup, on one worker."""
    with tempfile.TemporaryDirectory() as folder:
        cases.prepare(Path(folder))
        described = [json.dumps(dataclasses.asdict(setup)) for setup in setups]
        return ranks.run("tests.twin.steps:played", (1,), folder, "twin", *described, deadline_s=1800)


def table(found: list[dict[str, Any]]) -> str:
    """A table in Markdown of traffic per step, of four micro-batches."""
    lines = ["| job | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for row in found:
        counts = [sum(row["counts"][kind] for kind in kinds) for kinds in COLUMNS.values()]
        lines.append(f"| {row['setup']} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and then the places of each job."""
    found = rows([*STAGES, *OFFLOADED, *RECIPES])
    sys.stdout.write(table(found) + "\n")
    for row in found:
        sys.stdout.write(f"\n{row['setup']}\n{row['places']}\n")


if __name__ == "__main__":
    main()
