"""Measures the largest task of `minhash` or `repeated_lines` when most documents have the same text or lines, without Ray.

    python -m tests.benchmarks.hot_clusters [--documents 200000] [--kinds pages copies lines] [--memory-mib 4]

`pages` are pages of one shop: the same 60 words, and 6 words of their own. `copies` are exact copies of one page, spread over the
input. `lines` are documents with the same five lines twice, and one line of their own. One document in 20 is on its own. Prints,
for each kind of task: the number of tasks, their CPU seconds, and of the largest task the CPU seconds and MiB above the process's
memory before the task. A digest of the decisions (which document was dropped, and for which document) is the same for two
versions that decide the same.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

from heliostat.tasks import flow

from tests.benchmarks import harness
from tests.unit.build_curation import curate, left_out, spelled

PIECES = 40


def documents(kind: str, count: int) -> dict[str, str]:
    """Returns texts by id."""
    rng, texts = random.Random(0), dict[str, str]()
    page = " ".join(spelled(rng.randrange(10**6)) for _ in range(60))
    lines = [f"{part} of the menu" for part in page.split()[:5]]
    for i in range(count):
        own = " ".join(spelled(rng.randrange(10**6)) for _ in range(6))
        alone = " ".join(spelled(rng.randrange(10**6)) for _ in range(60))
        same = {"copies": page, "pages": f"{page} {own}", "lines": "\n".join([*lines, own, *lines])}[kind]
        texts[f"{i:07d}"] = f"{own} {alone}" if i % 20 == 0 else same
    return texts


def measure(kind: str, count: int, memory_limit: int) -> None:
    """Prints the table of one kind of documents."""
    costs, execute = defaultdict[str, list[tuple[float, float]]](list), flow.execute

    def measured(work: Any, run: str, name: str, *more: Any, **shared: Any) -> dict[str, Any]:
        before, start = harness.memory("VmRSS"), time.process_time()
        harness.forget_peak()
        record = execute(work, run, name, *more, **shared)
        costs[name].append((harness.memory("VmHWM") - before, time.process_time() - start))
        return record

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(flow, "execute", measured):
        stage = {"stage": "repeated_lines"} if kind == "lines" else {"stage": "minhash", "keep": "first"}
        found, here = curate(Path(folder), documents(kind, count), [stage], PIECES, memory_limit, again=0)
        result = sorted(left_out(found, here).items())
    digest = hashlib.sha256(repr(result).encode()).hexdigest()[:16]
    print(f"\n{kind}: {len(result):,} of {count:,} documents dropped; decisions {digest}\n")
    harness.head("tasks", "number", "CPU s", "CPU s of the largest", "MiB of the largest")
    for name, tasks in costs.items():
        seconds = [cpu for _, cpu in tasks]
        harness.row(name, len(tasks), f"{sum(seconds):.1f}", f"{max(seconds):.2f}", f"{max(mib for mib, _ in tasks):.0f}")
    harness.row("all", "", f"{sum(cpu for tasks in costs.values() for _, cpu in tasks):.1f}", "", "")


def main() -> None:
    arguments = harness.arguments(__doc__, documents=200_000, kinds=["pages", "copies", "lines"], memory_mib=4)
    for kind in arguments.kinds:
        measure(kind, arguments.documents, arguments.memory_mib << 20)


if __name__ == "__main__":
    main()
