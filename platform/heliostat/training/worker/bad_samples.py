"""Handles a run's bad samples: the budget that stops it, and the list of the samples replaced and their replacements.

`quarantine/step-00000100.jsonl` in the run's folder lists the samples replaced in the steps that the receipt of that name covers:
step, dataset, shard, row group, row, reason, and the replacement's shard, row group and row. No file: none were. Steps are
counted from 1; older lists, without `counted_from`, have them from 0.
"""

from __future__ import annotations

import json
from typing import Any

from heliostat.config.spec import Job
from heliostat.data.dataset import Dataset
from heliostat.data.order import Order
from heliostat.errors import DataError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location


def check_budget(bad: int, steps: int, job: Job, order: Order) -> None:
    """Checks the budget of bad samples.

    DataError if more samples were replaced than `data.max_bad_fraction` of an epoch, or of all those trained on.
    """
    base = max(int(order.epoch_samples.sum()), steps * job.train.global_batch)
    allowed = job.data.max_bad_fraction * base
    if bad > allowed:
        raise DataError(
            f"data.max_bad_fraction: {bad} bad samples were replaced by step {steps}, more than {job.data.max_bad_fraction:g} "
            f"of {base:,}; look at the shards that the warnings name, prepare them again, or raise the fraction"
        )


def write(run: Location, done: int, found: list[dict[str, Any]], dataset: Dataset) -> None:
    """Writes the list of what all workers have replaced since the last receipt, unless that is nothing."""
    if found:
        lines = [json.dumps(describe(bad, dataset)) for bad in sorted(found, key=lambda b: (b["step"], b["position"]))]
        run_folder.quarantine(run, done).write("\n".join(lines).encode() + b"\n")


def describe(bad: dict[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Describes a replaced sample as an entry of the list, with names instead of indices."""

    def place(source: int, chunk: int, row: int) -> dict[str, Any]:
        chunks = dataset.sources[source].chunks
        return {
            "dataset": dataset.plan.uris[source],
            "shard": chunks["path"][chunk].as_py(),
            "row_group": chunks["row_group"][chunk].as_py(),
            "row": row,
        }

    where = place(bad["source"], bad["chunk"], bad["row"])
    return {"step": bad["step"] + 1, "counted_from": 1, **where, "reason": bad["reason"], "replaced_by": place(*bad["by"])}
