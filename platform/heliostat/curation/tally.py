"""Counts the actions of stages on documents: the funnel, histograms of measures, and examples of dropped and barely kept
documents.

A tally is a dictionary of JSON values by stage (`NUMBER NAME`, such as `2 gopher_quality`). The sum of tallies doesn't depend
on their order. Histograms have a bin for every value, rounded to two significant digits. The examples of a rule are the twenty
documents whose ids have the lowest hashes. So they are a random sample, and every run chooses the same documents. Only the
seconds differ between runs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import Any

import xxhash

from heliostat.curation.picturing import thumbnail
from heliostat.curation.stage import Document, Outcome, Stage

EXAMPLES = 20  # examples per rule
EXCERPT = 1000  # characters
NEAR = 0.1  # maximum relative distance from the threshold of a barely kept document
Tally = dict[str, dict[str, Any]]


def label(number: int, stage: Stage) -> str:
    return f"{number} {stage.named()}"


def entry(tally: Tally, name: str) -> dict[str, Any]:
    """Returns the counts of a stage in the tally. If the tally has none, adds counts of zero."""
    if name not in tally:
        tally[name] = {"documents": 0, "bytes": 0, "kept": 0, "kept_bytes": 0, "seconds": 0.0, "dropped": {}, "counts": {},
                       "histograms": {}, "examples": {}}  # fmt: skip
    return tally[name]


def count(tally: Tally, name: str, stage: Stage, before: Document, outcome: Outcome, sizes: tuple[int, int]) -> None:
    """Counts a stage's result for a document. `sizes`: the document's bytes before and after the stage."""
    counts, kept = entry(tally, name), outcome.document is not None
    counts["documents"] += 1
    counts["bytes"] += sizes[0]
    counts["kept"] += kept
    counts["kept_bytes"] += sizes[1]
    if not kept:
        counts["dropped"][outcome.reason] = counts["dropped"].get(outcome.reason, 0) + 1
        example(counts["examples"], f"dropped {outcome.reason}", before, outcome.detail, outcome.measures)
    for what, number in outcome.counts.items():
        counts["counts"][what] = counts["counts"].get(what, 0) + number
    histograms, side = counts["histograms"], 0 if kept else 1
    for measure, value in outcome.measures.items():
        if (bins := histograms.get(measure)) is None:
            bins = histograms[measure] = {}
        if (pair := bins.get(name_of_bin := f"{rounded(value):.6g}")) is None:
            pair = bins[name_of_bin] = [0, 0]
        pair[side] += 1
    if kept and stage.thresholds:
        for measure in narrow(stage, outcome.measures):
            example(counts["examples"], f"kept {measure}", before, "", outcome.measures)


def narrow(stage: Stage, measures: dict[str, float]) -> list[str]:
    """Lists the measures whose value is within a tenth of one of the measure's thresholds."""
    near = list[str]()
    for measure, fields in stage.thresholds.items():
        if (value := measures.get(measure)) is None:
            continue
        for field in fields:
            limit: Any = getattr(stage, field, None)
            if type(limit) in (int, float) and abs(value - limit) <= NEAR * abs(limit):
                near.append(measure)
                break
    return near


def rounded(value: float) -> float:
    """Rounds to two significant digits. Infinities and NaN are returned unchanged."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, 1 - math.floor(math.log10(abs(value))))


def example(examples: dict[str, list[Any]], rule: str, document: Document, detail: str, measures: dict[str, float]) -> None:
    """Records a document as an example of a rule, if the document's hash is one of the EXAMPLES lowest hashes for this rule."""
    kept_examples, place = examples.setdefault(rule, []), xxhash.xxh64_intdigest(f"{rule}\0{document.id}".encode())
    if len(kept_examples) < EXAMPLES or place < kept_examples[-1][0]:
        text = document.text if isinstance(document.text, str) else document.text[: 4 * EXCERPT].decode("utf-8", "replace")
        picture = [thumbnail(document.picture.data)] if document.picture else []
        kept_examples.append([place, document.id, text[:EXCERPT], detail, measures, *picture])
        kept_examples.sort(key=lambda e: (e[0], e[1]))
        del kept_examples[EXAMPLES:]


def merge(tallies: Iterable[Tally]) -> Tally:
    """Returns the sum of tallies. Only the sum and one tally are in memory at a time."""
    total: Tally = {}
    for tally in tallies:
        add(total, tally)
    return total


def add(total: Tally, tally: Tally) -> None:
    """Adds the counts of `tally` to `total`, in place."""
    for name, part in tally.items():
        _add(entry(total, name), part)


def _add(total: dict[str, Any], part: dict[str, Any]) -> None:
    for key in ("documents", "bytes", "kept", "kept_bytes", "seconds"):
        total[key] += part[key]
    for key in ("dropped", "counts"):
        for what, number in part[key].items():
            total[key][what] = total[key].get(what, 0) + number
    for measure, bins in part["histograms"].items():
        known = total["histograms"].setdefault(measure, {})
        for value, (kept, dropped) in bins.items():
            pair = known.setdefault(value, [0, 0])
            pair[0] += kept
            pair[1] += dropped
    if "largest" in part:  # clusters, as (documents, the kept id)
        both = [*total.get("largest", []), *part["largest"]]
        total["largest"] = sorted(both, key=lambda pair: (-pair[0], pair[1]))[:EXAMPLES]
    if "sizes" in part:  # counts of clusters, by their documents
        known = total.setdefault("sizes", {})
        for size, number in part["sizes"].items():
            known[size] = known.get(size, 0) + number
    for rule, examples in part["examples"].items():
        known = total["examples"].get(rule, [])
        total["examples"][rule] = list(heapq.merge(known, examples, key=lambda e: (e[0], e[1])))[:EXAMPLES]
