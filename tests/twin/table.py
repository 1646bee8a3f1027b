"""Prints the traffic between the host and the device in a step: `python -m tests.twin.table`."""

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
COLUMNS = {
    "host reads": ("read",), "deferred reads": ("deferred read",), "synchronizations": ("synchronization",),
    "pinned uploads": ("upload",), "other uploads": ("blocking upload", "unpinned upload"),
}  # fmt: skip


def rows(setups: list[Setup], workers: int) -> list[dict[str, Any]]:
    """Returns the traffic in the third step of each setup, for the first of so many workers."""
    with tempfile.TemporaryDirectory() as folder:
        cases.prepare(Path(folder))
        described = [json.dumps(dataclasses.asdict(setup)) for setup in setups]
        found = ranks.run("tests.twin.steps:trained_in_ranks", (workers,), folder, "twin", *described, deadline_s=1800)
        return [row for row in found if row["rank"] == 0]


def table(found: list[dict[str, Any]]) -> str:
    """Formats a table in Markdown: traffic per step of four micro-batches."""
    lines = ["| job | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for row in found:
        counts = [sum(c["count"] for c in row["crossings"] if c["what"] in kinds) for kinds in COLUMNS.values()]
        lines.append(f"| {row['setup']} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints a table for one worker and one for two, and then the places of each job."""
    for workers in (1, 2):
        found = rows(STAGES, workers)
        sys.stdout.write(f"{workers} workers\n\n{table(found)}\n")
        for row in found:
            lines = [f"{c['count']} x {c['what']}: {c['operation']} at {c['line']} ({c['function']})" for c in row["crossings"]]
            sys.stdout.write("\n".join(["", row["setup"], *lines, ""]))


if __name__ == "__main__":
    main()
