"""Reads the share of a dry run from the command line, and tells its prediction: a table of stages, and plain sentences."""

from __future__ import annotations

from typing import Any

from heliostat.errors import ConfigError
from heliostat.terminal import duration

HEAD = ["stage", "documents", "kept", "of what was read", "bytes", "tokens", "CPU"]
HOUR_S = 3600


def fraction(given: str) -> float:
    """Reads a share as `0.1%` or `0.001`; ConfigError if it is none between 0 and 1."""
    text = given.strip()
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise ConfigError(f"--sample: {given!r} is no share of the input; give one as 0.1% or 0.001, above 0 and below 1")
    return found


def table(found: dict[str, Any]) -> list[list[str]]:
    read, rows = max(1, found["funnel"][0]["documents"]), [HEAD]
    for row in found["funnel"]:
        share = f"{row['kept'] / read:.1%} ({row['kept_low'] / read:.1%} to {row['kept_high'] / read:.1%})"
        hours = duration(row["cpu_hours"] * HOUR_S)
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        rows.append([row["stage"], f"{row['documents']:,}", f"{row['kept']:,}", share, f"{row['kept_bytes']:,}", tokens, hours])
    return rows


def explain(found: dict[str, Any]) -> list[str]:
    sample, whole = found["sample"], found["input"]
    cost = f"{found['cost']:,.2f} {found['currency']} by the plan's price table"
    cpu, wall = duration(found["cpu_hours"] * HOUR_S), duration(found["wall_hours"] * HOUR_S)
    few, many = duration(found["cpu_hours_low"] * HOUR_S), duration(found["cpu_hours_high"] * HOUR_S)
    row = found["funnel"][-1]
    size = f"{found['bytes']:,} bytes ({found['bytes_low']:,} to {found['bytes_high']:,}), "
    tokens = ""
    if found["tokens"] is not None:
        tokens = f"{found['tokens']:,} tokens ({found['tokens_low']:,} to {found['tokens_high']:,}), "
    return [
        f"{found['name']}: predicted from {sample['documents']:,} documents, {sample['fraction']:.4g} of {whole['bytes']:,} bytes"
        f" in {whole['files']:,} files, in {duration(found['seconds'])}",
        f"the whole: {found['documents']:,} documents ({row['kept_low']:,} to {row['kept_high']:,}), {size}{tokens}"
        f"{cpu} of CPU ({few} to {many}; {cost}), {wall} on {found['cpus']} CPUs",
        "in brackets: 95 %, as if documents were drawn one by one, with the fewest and the most duplicates that are possible; "
        "where neighbours are alike, more",
        *(f"note: {note}" for note in found["notes"]),
    ]
