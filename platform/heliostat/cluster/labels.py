"""Tells which nodes a label selector of Ray's takes: Ray's own matching runs in its scheduler alone.

A value is `v`, `!v`, `in(v, w)` or `!in(v, w)`. A node without the label is taken by the negated ones.
"""

from __future__ import annotations

from collections.abc import Mapping


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tells whether a node with these labels meets every condition of the selector."""
    return all(_meets(condition, labels.get(name)) for name, condition in selector.items())


def _meets(condition: str, value: str | None) -> bool:
    wanted = condition.removeprefix("!")
    listed = wanted.startswith("in(") and wanted.endswith(")")
    values = [one.strip() for one in wanted[3:-1].split(",")] if listed else [wanted]
    return (value in values) is not condition.startswith("!")
