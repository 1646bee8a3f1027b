"""Parses the share of the input that a dry run reads, and formats the prediction as a table of stages and as sentences."""

from __future__ import annotations

from typing import Any

from heliostat.errors import ConfigError
from heliostat.terminal import duration
from heliostat.text import plural

HEAD = ["stage", "documents", "kept", "share of documents read", "bytes", "tokens", "CPU"]
HOUR_S = 3600


def fraction(value: str) -> float:
    """Parses a share such as `0.1%` or `0.001`. Returns a number between 0 and 1; raises ConfigError for other values."""
    text = value.strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise ConfigError(f"--sample: {value!r} isn't a share of the input. Pass a share between 0 and 1, such as 0.1% or 0.001")
    return number


def table(report: dict[str, Any]) -> list[list[str]]:
    read, rows = max(1, report["funnel"][0]["documents"]), [HEAD]
    for row in report["funnel"]:
        share = f"{row['kept'] / read:.1%} ({row['kept_low'] / read:.1%} to {row['kept_high'] / read:.1%})"
        hours = duration(row["cpu_hours"] * HOUR_S)
        tokens = "" if row["tokens"] is None else f"{row['tokens']:,}"
        rows.append([row["stage"], f"{row['documents']:,}", f"{row['kept']:,}", share, f"{row['kept_bytes']:,}", tokens, hours])
    return rows


def explain(facts: dict[str, Any]) -> list[str]:
    sample, whole = facts["sample"], facts["input"]
    cost = f"{facts['cost']:,.2f} {facts['currency']} at the prices of `heliostat plan`"
    cpu, wall = duration(facts["cpu_hours"] * HOUR_S), duration(facts["wall_hours"] * HOUR_S)
    few, many = duration(facts["cpu_hours_low"] * HOUR_S), duration(facts["cpu_hours_high"] * HOUR_S)
    row = facts["funnel"][-1]
    size = f"{facts['bytes']:,} bytes ({facts['bytes_low']:,} to {facts['bytes_high']:,}), "
    tokens = ""
    if facts["tokens"] is not None:
        tokens = f"{facts['tokens']:,} tokens ({facts['tokens_low']:,} to {facts['tokens_high']:,}), "
    return [
        f"{facts['name']}: predicted from {sample['documents']:,} documents, {sample['fraction']:.4g} of {whole['bytes']:,} bytes"
        f" in {plural(whole['files'], 'file')}, in {duration(facts['seconds'])}",
        (
            f"whole input: {facts['documents']:,} documents ({row['kept_low']:,} to {row['kept_high']:,}), {size}{tokens}{cpu} "
            f"of CPU time ({few} to {many}; {cost}), {wall} on {facts['cpus']} CPUs"
        ),
        (
            "in brackets: 95 % intervals, from the fewest to the most possible duplicates. These intervals assume independent "
            "documents. If neighboring documents are similar, the true intervals are wider"
        ),
        *(f"note: {note}" for note in facts["notes"]),
    ]
