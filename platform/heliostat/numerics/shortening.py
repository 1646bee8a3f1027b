"""Shortens the rows of datasets of conversations for a small job. All functions are pure.

A shortened row is a valid row: a part of a conversation is a conversation, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyarrow as pa

from heliostat.data.content import Content

Row = dict[str, Any]


def shortened(content: Content, longest: int) -> Content:
    """Cuts each row of packs or preferences to at most `longest` tokens. Returns other content unchanged."""
    if not isinstance(content, pa.Table):
        return content
    names = set(content.column_names)
    cut: Callable[[Row, int], Row] | None = pack if "trained" in names else preference if "chosen" in names else None
    if cut is None:
        return content
    rows = [cut(row, longest) for row in content.to_pylist()]
    return cast("Content", pa.Table.from_pylist(rows, schema=content.schema))


def pack(row: Row, longest: int) -> Row:
    """Cuts a range of `longest` tokens out of a row of packs. If possible, the first trained token is in the middle of the
    range."""
    size = len(row["tokens"])
    if size <= longest:
        return row
    first = row["trained"].index(True) if any(row["trained"]) else 0
    start = min(max(0, first - longest // 2), size - longest)
    end, ids, lengths, at = start + longest, [], [], 0
    for name, length in zip(row["ids"], row["lengths"], strict=True):
        inside = min(end, at + length) - max(start, at)
        if inside > 0:
            ids.append(name)
            lengths.append(inside)
        at += length
    return {**row, "ids": ids, "lengths": lengths, "tokens": row["tokens"][start:end], "trained": row["trained"][start:end]}


def preference(row: Row, longest: int) -> Row:
    """Shortens the prompt and both answers to half of `longest`. The answers begin with the first token in which they differ, and
    the prompt includes the tokens before."""
    if len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) <= longest:
        return row
    same, fewest = 0, min(len(row["chosen"]), len(row["rejected"]))
    while same < fewest - 1 and row["chosen"][same] == row["rejected"][same]:
        same += 1
    half = longest // 2
    prompt = [*row["prompt"], *row["chosen"][:same]][-half:]
    return {**row, "prompt": prompt, **{name: row[name][same : same + half] for name in ("chosen", "rejected")}}
