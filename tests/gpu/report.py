"""Formats the results of parts, as lines for a terminal, and as Markdown for docs/benchmarks."""

from __future__ import annotations

from typing import Any

HEADS = {
    "correctness": ("what", "difference", "limit", "ok"),
    "run": ("what", "value", "unit", "ok"),
    "memory": ("what", "peak_gib", "plan_gib", "difference", "limit", "ok"),
    "overlap": ("what", "step_s", "without_s", "copies_s", "overlap", "ok"),
    "speed": ("what", "tokens_per_second", "mfu", "step_s", "peak_gib", "plan_gib"),
    "checkpoint": ("what", "gib", "blocked_s", "seconds"),
}
TITLES = {
    "difference": "relative difference",
    "ok": "right",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "step_s": "s per step",
    "without_s": "s per step without offload",
    "copies_s": "s of copies",
    "overlap": "copies hidden",
    "peak_gib": "peak GiB",
    "plan_gib": "planned GiB",
    "gib": "GiB",
    "blocked_s": "s blocked",
    "seconds": "s in all",
}
WIDTHS = (4, 50, 4, 30)


def line(*cells: str) -> str:
    """Aligns the cells of a part's line, except the last one."""
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)), cells[-1]]).rstrip()


def number(rows: list[dict[str, Any]]) -> str:
    """Formats the most informative number of a part's rows; "" if there is none."""
    if not rows:
        return ""
    kind, last = rows[0]["kind"], rows[-1]
    if kind == "correctness":
        worst = max(rows, key=lambda row: (row["difference"] / row["limit"] if row["limit"] else row["difference"], row["limit"]))
        return f"{_cell(worst['difference'])}, limit {_cell(worst['limit'])}"
    if kind == "run":
        return f"{_cell(last['value'])} {last['unit']}"
    if kind == "memory":
        known = [row["difference"] for row in rows if row["difference"] is not None]
        return f"plan off by {max(known):.1%} at most" if known else ""
    if kind == "overlap":
        return f"{last['overlap']:.0%} of copies hidden" if last["overlap"] is not None else ""
    if kind == "checkpoint":
        return f"{last['blocked_s']:.2f} s blocked"
    return (f"MFU {last['mfu']:.1%}, " if last["mfu"] else "") + f"{last['tokens_per_second']:,.0f} tokens/s"


def wrong(row: dict[str, Any]) -> str:
    """Describes a row with a wrong result."""
    if row.get("problem"):
        return f"{row['what']}: {row['problem']}"
    if row["kind"] == "speed":
        return f"{row['what']}: MFU {row['mfu']:.1%}, goal {row['goal']:.0%}"
    if row["kind"] == "overlap":
        return f"{row['what']}: {row['overlap']:.0%} of the copies are hidden"
    if row["kind"] == "run":
        return f"{row['what']}: {_cell(row['value'])} {row['unit']}"
    return f"{row['what']}: {_cell(row['difference'])}, limit {_cell(row['limit'])}"


def markdown(found: dict[str, Any]) -> str:
    """Formats the page: the machine, a line for each part, and a table for each kind of row."""
    machine, parts = found["machine"], found["parts"]
    versions = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items() if v)
    lines = ["# On a GPU", "", f"`python -m tests.gpu`, {found['date']}: {machine.get('device', 'unknown')}, Python "
             f"{machine.get('python', '?')}, {versions}. {found['seconds']:.0f} s."]  # fmt: skip
    lines += ["", _row(["part", "status", "s", "number", "cause"]), _row(["---"] * 5)]
    lines += [_row([p["name"], p["status"], f"{p['seconds']:.0f}", p.get("number", ""), _plain(p["cause"])]) for p in parts]
    for kind, head in HEADS.items():
        rows = [row for part in parts for row in part["rows"] if row["kind"] == kind]
        if rows:
            lines += ["", f"## {kind.capitalize()}", "", _row([TITLES.get(h, h) for h in head]), _row(["---"] * len(head))]
            lines += [_row([_cell(row.get(h)) for h in head]) for row in rows]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:200]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
