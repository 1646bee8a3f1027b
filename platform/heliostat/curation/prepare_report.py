"""Formats the report of `heliostat data prepare` as sentences."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from heliostat.curation import recording
from heliostat.data.conversations import CONTENTS, ConversationFacts


def in_words(reason: str) -> str:
    """Formats a drop reason of a report, `NUMBER STAGE: REASON`, for people: `STAGE: REASON`."""
    stage, _, why = re.sub(r"^\d+ ", "", reason).partition(": ")
    return f"{stage}: {why}" if why not in ("", stage) else stage


def explain(report: dict[str, Any]) -> list[str]:
    """Formats the report as sentences: the dataset's content, and the dropped documents."""
    state = "is up to date" if report["up_to_date"] else f"is ready after {report['seconds']:.0f} s"
    form = CONTENTS[report["conversations"]["form"]] if report["conversations"] else "rows"
    contents = f"{report['documents']:,} " + (f"documents, {report['tokens']:,} tokens" if report["tokens"] else form)
    left_out = Counter(duplicate=report["duplicates"])
    for reason, count in report["dropped"].items():
        left_out[in_words(reason)] += count
    reasons_text = ", ".join(f"{n:,} {reason}" for reason, n in sorted(left_out.items()) if n)
    listed = f" (listed in {report['listed']})" if report["listed"] else ""
    lines = [
        f"dataset {report['dataset']} {state}: {contents}, {report['chunks']:,} chunks, digest {report['digest'][:12]}",
        f"dropped: {reasons_text or 'nothing'}{listed}",
    ]
    if limits := recording.limits(report["recorded_every"]):
        lines.append(f"{limits}. The numbers of dropped documents are exact")
    if named := report["hub"]:
        lines.append(f"from {', '.join(named.values())}")
    for column, one in report["stored"].items():
        lines.append(f"{column}: stored as {one['dtype']}, with a relative error of {one['relative_error']:.2%}")
    if by := report["written_by"]:
        model = f"{by['model']['digest'][:12]} ({by['model']['folder']})"
        lines.append(f"written by model {model}: {by['answers']:,} answers to {by['input']}")
    if counts := report["rearranged"]:
        lines.append(f"rearranged for fill in the middle: {counts['texts']:,} texts of {counts['documents']:,} documents, "
            f"{counts['suffix_first']:,} of them with the suffix first")  # fmt: skip
    if facts := report["conversations"]:
        lines += _of_conversations(facts)
    return lines


def _of_conversations(facts: ConversationFacts) -> list[str]:
    counts = Counter(facts["counts"])
    what, share = facts["form"], counts["trained"] / counts["tokens"]
    if what == "preferences":
        lines = [f"preferences: {counts['conversations']:,} with {counts['tokens']:,} tokens, {share:.0%} in answers"]
    else:
        space = counts["tokens"] + counts["padding"]
        lines = [
            f"conversations: {counts['conversations']:,} with {counts['tokens']:,} tokens, "
            f"in {space // facts['sequence_length']:,} rows that are {counts['tokens'] / space:.1%} full",
            f"trained: {share:.0%} of the tokens, in {counts['turns']:,} turns; {counts['trained_ends']:,} turns with their end",
        ]
    each = facts["turns"] == "each"
    meanings = {
        "cut": "conversations with turns cut or left out at sequence_length" if each else "conversations cut to sequence_length",
        "split": "conversations made into one conversation per turn" if each else "conversations split at sequence_length",
        "trailing": "messages after the last answer left out",
        "retokenized": "conversations whose complete text has other tokens than its segments",
        "ended": "conversations ended with the end-of-document token, because the template has no token that ends a turn",
    }
    return [*lines, *(f"{counts[name]:,} {meaning}" for name, meaning in meanings.items() if counts[name])]
