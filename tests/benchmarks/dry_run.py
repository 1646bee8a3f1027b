"""Measures the errors of `prepare --sample`: prepares a folder completely once, and predicts the result from shares of it.

    python -m tests.benchmarks.dry_run PIPELINE.yaml [--share 0.01 0.03 0.1] [--here]

Prints a row per stage: the documents that it keeps of the whole, and the prediction of each share, with its error. Seconds are
CPU time on the same machine: those of the stages, recorded by the whole run, and with --here those of all tasks. With --here,
tasks run one after another in this process, without Ray. A first prediction is discarded, because it includes one-time loading.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from heliostat.curation import reasons
from heliostat.curation.prepare import dry_run, prepare
from heliostat.data import manifest
from heliostat.storage.locations import Location
from heliostat.tasks.clusters import Cluster
from heliostat.tasks.work import Work

from tests.benchmarks import harness
from tests.unit.build_curation import HereFlow
from tests.unit.build_pipeline import Here, make_dataset


@dataclass
class Timed(HereFlow):
    """Sums the seconds of all tasks of all runs."""

    total: ClassVar[float] = 0.0

    def _count(self, counts: dict[str, int], kind: str, record: dict[str, Any]) -> None:
        super()._count(counts, kind, record)
        Timed.total += record["seconds"]


class Pipeline(Here):
    def flow(self, work: Work | None = None, cluster: Cluster | None = None) -> HereFlow:
        return Timed(work or self.worked, again=0)


def whole(pipeline: Path, folder: str, here: bool) -> tuple[dict[str, float], float]:
    """Prepares the whole input; returns the documents that each stage kept, tokens and CPU seconds, and the elapsed seconds."""
    start, before = time.monotonic(), Timed.total
    made = make_dataset(_here(pipeline, f"{folder}/out")) if here else None
    if made is None:
        prepare(pipeline, [f"output={folder}/out"])
    found = made or manifest.read(Location(f"{folder}/out"))
    funnel = {name: float(part["kept"]) for name, part in reasons.funnel(found).items() if name != "finish"}
    bytes = {f"{name} (bytes)": float(part["kept_bytes"]) for name, part in reasons.funnel(found).items() if name == "shard"}
    seconds = {"CPU s of the stages": sum(reasons.seconds(found).values())}
    seconds |= {"CPU s of all tasks": Timed.total - before} if here else {}
    return {**funnel, **bytes, "tokens": float(found.tokens), **seconds}, time.monotonic() - start


def _here(pipeline: Path, output: str) -> Pipeline:
    keys = yaml.safe_load(pipeline.read_text())
    return Pipeline(**{k: v for k, v in keys.items() if k != "pipeline"} | {"output": output})


def predicted(pipeline: Path, folder: str, share: float, here: bool) -> tuple[dict[str, float], float]:
    """Predicts the same from a share of the input; returns the prediction with the elapsed seconds."""
    if here:
        one = _here(pipeline, f"{folder}/other")
        found = one.predict(Location(f"{folder}/trial-{share}"), one.inputs(), share)
    else:
        found = dry_run(pipeline, [f"output={folder}/other"], share)
    rows = {row["stage"]: float(row["kept"]) for row in found["funnel"]}
    seconds = {"CPU s of the stages": sum(row["cpu_hours"] for row in found["funnel"]) * 3600,
               "CPU s of all tasks": found["cpu_hours"] * 3600}  # fmt: skip
    bytes = {"shard (bytes)": float(found["funnel"][-1]["kept_bytes"])}
    for note in found["notes"]:
        print(f"    {share:g}: {note}", flush=True)
    return {**rows, **bytes, "tokens": float(found["tokens"]), **seconds}, found["seconds"]


def main() -> None:
    arguments = harness.arguments(__doc__, pipeline=Path, share=[0.01, 0.03, 0.1], here=False)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.here:  # thrown away: what a process loads once counts for neither
            predicted(arguments.pipeline, f"{folder}/first", arguments.share[-1], True)
        truth, took = whole(arguments.pipeline, folder, arguments.here)
        tried = {share: predicted(arguments.pipeline, folder, share, arguments.here) for share in arguments.share}
    harness.head("", "the whole", *(f"{share:.0%}" for share in tried))
    for name, value in truth.items():
        cells = (f"{found[name]:,.0f} ({found[name] / value - 1:+.0%})" for found, _ in tried.values())
        harness.row(name, f"{value:,.0f}", *cells)
    harness.row("took, s", f"{took:.0f}", *(f"{seconds:.0f}" for _, seconds in tried.values()))


if __name__ == "__main__":
    main()
