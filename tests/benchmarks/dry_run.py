"""How near `prepare --sample` comes to the whole: a folder prepared once as a whole, and predicted from shares of it.

    PYTHONPATH=. python tests/benchmarks/dry_run.py PIPELINE.yaml [--share 0.01 0.03 0.1] [--here]

Prints a row for each stage: documents that it leaves of the whole, and what each share predicts, with its error. Seconds are
of processor time, which the whole recorded of its stages, so both are of the same machine. With --here tasks run one after
another in this process, without Ray; a first prediction, thrown away, loads what is loaded once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import yaml
from heliostat.curation import reasons
from heliostat.data import manifest
from heliostat.pipelines.prepare import dry_run, prepare
from heliostat.storage import Location

from tests.unit.build_pipeline import Here, make_dataset


def whole(pipeline: Path, folder: str, here: bool) -> tuple[dict[str, float], float]:
    """Prepares the whole; returns what each stage kept, tokens and CPU seconds, and the seconds it took."""
    start = time.monotonic()
    made = make_dataset(_here(pipeline, f"{folder}/out")) if here else None
    if made is None:
        prepare(pipeline, [f"output={folder}/out"])
    found = made or manifest.read(Location(f"{folder}/out"))
    funnel = {name: float(part["kept"]) for name, part in reasons.funnel(found).items() if name != "finish"}
    bytes = {f"{name} (bytes)": float(part["kept_bytes"]) for name, part in reasons.funnel(found).items() if name == "shard"}
    seconds = sum(reasons.seconds(found).values())
    return {**funnel, **bytes, "tokens": float(found.tokens), "CPU s": seconds}, time.monotonic() - start


def _here(pipeline: Path, output: str) -> Here:
    keys = yaml.safe_load(pipeline.read_text())
    return Here(**{k: v for k, v in keys.items() if k != "pipeline"} | {"output": output})


def predicted(pipeline: Path, folder: str, share: float, here: bool) -> tuple[dict[str, float], float]:
    """Predicts the same from a share of the input; returns it with the seconds it took."""
    if here:
        one = _here(pipeline, f"{folder}/other")
        found = one.predict(Location(f"{folder}/trial-{share}"), one.inputs(), share)
    else:
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
    parser.add_argument("--here", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.here:  # thrown away: what a process loads once counts for neither
            predicted(arguments.pipeline, f"{folder}/first", arguments.share[-1], True)
        truth, took = whole(arguments.pipeline, folder, arguments.here)
        tried = {share: predicted(arguments.pipeline, folder, share, arguments.here) for share in arguments.share}
    print("| | the whole |" + "".join(f" {share:.0%} |" for share in tried))
    print("|---|---|" + "---|" * len(tried))
    for name, value in truth.items():
        cells = "".join(f" {found[name]:,.0f} ({found[name] / value - 1:+.0%}) |" for found, _ in tried.values())
        print(f"| {name} | {value:,.0f} |{cells}")
    print(f"| took, s | {took:.0f} |" + "".join(f" {seconds:.0f} |" for _, seconds in tried.values()))


if __name__ == "__main__":
    main()
