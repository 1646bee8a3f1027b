"""Provides one shared console for standard error, so that a live line and log lines don't overwrite each other on a terminal."""

from __future__ import annotations

from rich.console import Console

console = Console(stderr=True)


def duration(seconds: float) -> str:
    """Formats a duration in its two largest units, for example `42 s`, `5 min 10 s`, `3 h 20 min`, or `2 d 4 h`."""
    whole = max(0, round(seconds))
    for size, unit, smaller, name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole} s"


def fit(parts: list[tuple[int, str]], width: int, gap: str = "  ") -> str:
    """Joins texts to one line of at most `width` characters. `parts`: pairs (rank, text).

    If the line is too long, leaves out the text with the highest rank first. The first text always stays, and is shortened if
    necessary.
    """
    kept = [(rank, text) for rank, text in parts if text]
    while len(kept) > 1 and len(gap.join(text for _, text in kept)) > width:
        kept.remove(max(kept[1:], key=lambda one: one[0]))
    line = gap.join(text for _, text in kept)
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"
