"""Writes what the pieces found as Markdown, for docs/benchmarks."""

from __future__ import annotations

from typing import Any

HEADS = {
    "correctness": ("what", "difference", "limit", "ok"),
    "speed": ("what", "tokens_per_second", "mfu", "step_s", "peak_gib", "plan_gib"),
    "checkpoint": ("what", "gib", "blocked_s", "seconds"),
}
TITLES = {
    "difference": "apart from its CPU twin",
    "ok": "right",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "step_s": "s a step",
    "peak_gib": "peak GiB",
    "plan_gib": "the plan's GiB",
    "gib": "GiB",
    "blocked_s": "s blocked",
    "seconds": "s in all",
}


def markdown(found: dict[str, Any]) -> str:
    """Makes the page: the machine, a table for each kind of row, and what did not run, with the reason."""
    machine, pieces = found["machine"], found["pieces"]
    versions = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items() if v)
    lines = ["# On a GPU", "", f"`python -m tests.gpu`, {found['date']}: {machine.get('device', 'unknown')}, Python "
             f"{machine.get('python', '?')}, {versions}. {found['seconds']:.0f} s."]  # fmt: skip
    for kind, head in HEADS.items():
        rows = [row for piece in pieces for row in piece["rows"] if row["kind"] == kind]
        if rows:
            lines += ["", f"## {kind.capitalize()}", "", _line([TITLES.get(h, h) for h in head]), _line(["---"] * len(head))]
            lines += [_line([_cell(row.get(h)) for h in head]) for row in rows]
    aside = [piece for piece in pieces if piece["status"] != "passed"]
    if aside:
        lines += ["", "## Not passed", "", _line(["piece", "status", "reason"]), _line(["---"] * 3)]
        lines += [_line([p["name"], p["status"], p["reason"].replace("|", "/").replace("\n", " ")[:200]]) for p in aside]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
