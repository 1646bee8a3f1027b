"""Checks a job's numerics: runs a small copy of the job on two workers and in one plain torch process, and compares the results.

    result = check(checked)         # {"ok", "rows", "faults", "trial", "seconds", "losses"}

Each comparison has a limit, which depends on the job's precision (`rows.LIMITS`):

- the initial weights
- the weights in use against the fp32 master weights
- each step's loss, and every parameter's gradient and update
- the state that another parallelism configuration loads from a checkpoint, and the next losses of this configuration
- the receipts of both configurations
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from heliostat.config.spec import Job
from heliostat.numerics import processes
from heliostat.numerics.rows import LIMITS, DifferenceRow, Thresholds
from heliostat.runs import verify
from heliostat.storage.locations import Location
from heliostat.validation import check as checks


def check(checked: checks.Checked) -> dict[str, Any]:
    """Runs the small job in separate processes, and compares the results. Raises the error of a process that failed."""
    began, job = time.monotonic(), checked.job
    with tempfile.TemporaryDirectory(prefix="heliostat-numerics-") as name:
        processes.run(job, list(checked.plan.digests), Path(name), _gpus(job))
        return {**conclude(Path(name)), "seconds": time.monotonic() - began}


def conclude(folder: Path) -> dict[str, Any]:
    """Compares the results that the processes of the small job wrote to `folder`."""
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("trial", "played", "resumed", "plain")}
    rows = [*_rows(files, LIMITS[files["trial"]["precision"]]), _receipts(Location(files["trial"]["run"]))]
    faults = [fault for row in rows for fault in row.faults]
    return {
        "ok": not faults,
        "trial": files["trial"],
        "rows": [{k: v for k, v in row.dump().items() if k != "faults"} | {"faults": len(row.faults)} for row in rows],
        "faults": [{**vars(fault), "text": str(fault)} for fault in faults],
        "losses": {"engine": files["played"]["losses"], "plain": files["plain"]["losses"], "resumed": files["resumed"]["losses"]},
    }


def _rows(files: dict[str, Any], limits: Thresholds) -> list[DifferenceRow]:
    played, plain, resumed = files["played"], files["plain"], files["resumed"]
    begun, gradients, updates = (DifferenceRow.parse(row) for row in plain["rows"])
    loss, behind = DifferenceRow("loss", limits.loss), DifferenceRow("resumed loss", limits.resumed)
    for step, (own, right) in enumerate(zip(played["losses"], plain["losses"], strict=True), 1):
        loss.add(step, "", _apart(own, right))
    after = files["trial"]["resumed"]["step"]
    for step, (own, right) in enumerate(zip(resumed["losses"], played["losses"][after:], strict=True), after + 1):
        behind.add(step, "", _apart(own, right))
    return [begun, _together(played["rows"]), loss, gradients, updates, DifferenceRow.parse(resumed["row"]), behind]


def _together(parts: list[dict[str, object]]) -> DifferenceRow:
    """Joins the rows of all workers.

    The joined row has the worst difference of all workers, and the faults of all workers.
    """
    rows = [DifferenceRow.parse(part) for part in parts]
    worst = max(rows, key=lambda row: row.worst)
    worst.count, worst.faults = sum(r.count for r in rows), [fault for r in rows for fault in r.faults]
    return worst


def _apart(own: float, right: float) -> float:
    return abs(own - right) / max(abs(right), 1e-30) if own == own else float("inf")


def _receipts(run: Location) -> DifferenceRow:
    """Verifies the receipts (records of the used samples) of both configurations: each step must use the planned samples, each
    once."""
    row, report = DifferenceRow("receipts", 0.0), verify.verify(run)
    wrong = report["lost"] + report["repeated"] + (0 if report["ok"] else 1)
    row.add(report["steps"], "", float(wrong), lambda: verify.explain(report))
    row.count = report["samples"]
    return row


def _gpus(job: Job) -> bool:
    """Checks whether the job uses GPUs, and this machine has a GPU for each worker of the small job."""
    if not job.workers.gpus:
        return False
    import torch

    from heliostat.numerics.small import WORKERS

    return torch.cuda.device_count() >= WORKERS
