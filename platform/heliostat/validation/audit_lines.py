"""Formats the audit of loss masks for the terminal: one paragraph per source, and some conversations with their masks."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from heliostat.recipes.auditing import MarkedText, MaskAudit, SourceAudit
from heliostat.text import printable

TRAINED, OTHER, WARNING = "bold green", "dim", "yellow"
DIGITS = 12  # of a digest
OPEN, CLOSE = "⟦", "⟧"  # around trained text where there are no colors


def lines(audit: MaskAudit, colored: bool) -> Iterator[Text]:
    """Yields the lines of an audit. `colored`: whether the terminal shows colors; otherwise brackets mark trained text."""
    for source in audit["sources"]:
        yield Text(summary(source))
    yield from (Text(warning, WARNING) for warning in audit["warnings"])
    for number, example in enumerate(audit["examples"], 1):
        how = "green: trained" if colored else f"{OPEN}…{CLOSE}: trained"
        yield Text(f"conversation {number} of {len(audit['examples'])} ({how})")
        yield conversation(example, colored)


def summary(source: SourceAudit) -> str:
    """Describes the loss mask of a source."""
    damaged = f", {source['unreadable']:,} row groups unreadable" if source["unreadable"] else ""
    return (
        f"loss mask of {printable(source['name'])}: {source['conversations']:,} conversations in {source['rows']:,} rows "
        f"({source['fill']:.1%} full), {source['trained_share']:.1%} of {source['tokens']:,} tokens trained, template "
        f"{source['template'][:DIGITS]}; in the {source['sampled_rows']:,} rows read, {source['untrained_rows']:,} have nothing "
        f"to train, and {source['trained_ends']:,} of {source['sampled_turns']:,} trained turns have a trained end{damaged}"
    )


def conversation(example: list[MarkedText], colored: bool) -> Text:
    """Formats a conversation. Trained text is green and bold, or in brackets; the other text is dim."""
    text = Text("  ")
    for part in example:
        shown = printable(part["text"], lines=True).replace("\n", "\n  ")
        if not part["trained"]:
            text.append(shown, OTHER)
        else:
            text.append(shown if colored else f"{OPEN}{shown}{CLOSE}", TRAINED)
    return text
