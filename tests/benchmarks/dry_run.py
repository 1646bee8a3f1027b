"""How near `prepare --sample` comes to the whole: a folder prepared once as a whole, and predicted from shares of it.

    PYTHONPATH=. python tests/benchmarks/dry_run.py PIPELINE.yaml [--share 0.01 0.03 0.1]

Prints a row for each stage: documents that it leaves of the whole, and what each share predicts, with its error. Seconds are
those that the whole recorded of its stages, so both are of the same machine; run nothing beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from heliostat.curation import reasons
from heliostat.data import manifest
from heliostat.pipelines.prepare import dry_run, prepare
from heliostat.storage import Location


def whole(pipeline: Path, folder: str) -> tuple[dict[str, float], float]:
    """Prepares the whole; returns what each stage kept, tokens and CPU seconds, and the seconds it took."""
    made = prepare(pipeline, [f"output={folder}/out"])
    found = manifest.read(Location(f"{folder}/out"))
    funnel = {name: float(part["kept"]) for name, part in reasons.funnel(found).items() if name != "finish"}
    bytes = {f"{name} (bytes)": float(part["kept_bytes"]) for name, part in reasons.funnel(found).items() if name == "shard"}
    seconds = sum(reasons.seconds(found).values())
    return {**funnel, **bytes, "tokens": float(made["tokens"]), "CPU s": seconds}, made["seconds"]


def predicted(pipeline: Path, folder: str, share: float) -> tuple[dict[str, float], float]:
    """Predicts the same from a share of the input; returns it with the seconds it took."""
    found = dry_run(pipeline, [f"output={folder}/other"], share)
    rows = {row["stage"]: float(row["kept"]) for row in found["funnel"]}
    seconds = sum(row["cpu_hours"] for row in found["funnel"]) * 3600
    bytes = {"shard (bytes)": float(found["funnel"][-1]["kept_bytes"])}
    for note in found["notes"]:
        print(f"    {share:g}: {note}", flush=True)
    return {**rows, **bytes, "tokens": float(found["tokens"]), "CPU s": seconds}, found["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--share", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        truth, took = whole(arguments.pipeline, folder)
        tried = {share: predicted(arguments.pipeline, folder, share) for share in arguments.share}
    print("| | the whole |" + "".join(f" {share:.0%} |" for share in tried))
    print("|---|---|" + "---|" * len(tried))
    for name, value in truth.items():
        cells = "".join(f" {found[name]:,.0f} ({found[name] / value - 1:+.0%}) |" for found, _ in tried.values())
        print(f"| {name} | {value:,.0f} |{cells}")
    print(f"| took, s | {took:.0f} |" + "".join(f" {seconds:.0f} |" for _, seconds in tried.values()))


if __name__ == "__main__":
    main()
