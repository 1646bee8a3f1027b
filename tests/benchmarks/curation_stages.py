"""Compares stages of curation with datatrove's: their decisions, and MB/s per core, interleaved. By hand:

    python -m tests.benchmarks.curation_corpus FOLDER corpus.jsonl
    python -m tests.benchmarks.curation_stages corpus.jsonl --datatrove VENV/bin/python --stages gopher_quality c4

The other Python has `datatrove[processing,io]` and spaCy. With `--curator VENV/bin/python`, a Python that has
`nemo-curator[text_cpu]`, NeMo Curator's filters run too. Each turn is a separate process. CPU seconds count, not wall-clock time.
Numbers: docs/benchmarks/curation-stages.md.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks import harness

COMPARED = ["gopher_quality", "gopher_repetition", "c4", "fineweb"]
WARM = "Some words to begin with. " * 30


def texts(path: str, most: int) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()[:most]]


def ours(name: str, path: str, most: int) -> dict[str, Any]:
    """Runs a stage over the documents, 64 at a time; returns CPU seconds, and the reason to drop each, or "" if it stays."""
    from heliostat.curation.stage import Document, Stage

    module = importlib.import_module(f"heliostat.curation.stages.{name}")
    classes = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    (stage,) = (c for c in classes if issubclass(c, Stage))
    documents = [Document(str(i), t.encode() if name == "extract" else t) for i, t in enumerate(texts(path, most))]
    work, out = stage().open(), []
    work([Document("0", WARM)])
    start = time.process_time()
    for i in range(0, len(documents), 64):
        out += work(documents[i : i + 64])
    return {"seconds": time.process_time() - start, "decisions": [o.reason for o in out]}


def theirs(name: str, path: str, most: int) -> dict[str, Any]:
    """Runs one of datatrove's filters over the same documents."""
    from datatrove.data import Document

    work, given = their_work(name), texts(path, most)
    work(Document(text=WARM, id="0"))
    decisions, start = [], time.process_time()
    for i, text in enumerate(given):
        try:
            decision = work(Document(text=text, id=str(i)))
        except Exception as e:  # noqa: BLE001 - shown as its decision
            decision = (False, f"error: {type(e).__name__}")
        kept, reason = decision if isinstance(decision, tuple) else (decision, "dropped")
        decisions.append("" if kept else reason)
    return {"seconds": time.process_time() - start, "decisions": decisions}


def curators(name: str, path: str, most: int) -> dict[str, Any]:
    """Runs NeMo Curator's filters that measure what a Gopher filter measures, with NeMo Curator's thresholds and words. A dropped
    document doesn't reach the next filter."""
    from nemo_curator.stages.text.filters.heuristic import repetition, string

    filters = {
        "gopher_quality": [string.WordCountFilter(), string.MeanWordLengthFilter(), string.SymbolsToWordsFilter(),
                           string.BulletsFilter(), string.EllipsisFilter(), string.WordsWithoutAlphabetsFilter(),
                           string.CommonEnglishWordsFilter()],
        "gopher_repetition": [repetition.RepeatedLinesFilter(), repetition.RepeatedParagraphsFilter(),
                              repetition.RepeatedLinesByCharFilter(), repetition.RepeatedParagraphsByCharFilter(),
                              *(repetition.RepeatingTopNGramsFilter(n) for n in range(2, 5)),
                              *(repetition.RepeatingDuplicateNGramsFilter(n) for n in range(5, 11))],
    }[name]  # fmt: skip

    def dropped(text: str) -> str:
        return next((type(one).__name__ for one in filters if not one.keep_document(one.score_document(text))), "")

    documents = texts(path, most)
    dropped(WARM)
    start = time.process_time()
    decisions = list(map(dropped, documents))
    return {"seconds": time.process_time() - start, "decisions": decisions}


def their_work(name: str) -> Any:
    from datatrove.pipeline import filters
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

    formats = {
        "extract": lambda: Trafilatura().extract,
        "fix_text": lambda: FTFYFormatter().format,
        "pii": lambda: PIIFormatter().format,
    }
    if name in formats:
        work = formats[name]()
        return lambda document: (True, work(document.text))
    kinds = {"gopher_quality": filters.GopherQualityFilter, "gopher_repetition": filters.GopherRepetitionFilter,
             "c4": filters.C4QualityFilter, "fineweb": filters.FineWebQualityFilter}  # fmt: skip
    return kinds[name]().filter


def differences(here: list[str], there: list[str], rows: list[dict[str, str]]) -> Iterator[str]:
    """Yields a line for each document that one side keeps and the other drops."""
    for x, y, document in zip(here, there, rows, strict=True):
        if bool(x) != bool(y):
            yield f"    {document['id']}: ours {x or 'kept'}, datatrove {y or 'kept'}"


def main() -> None:
    given = harness.arguments(__doc__, corpus=Path, datatrove="", curator="", stages={"nargs": "+", "default": COMPARED}, turns=3,
                              most=1 << 30, differences=False)  # fmt: skip
    rows = [json.loads(line) for line in given.corpus.read_text().splitlines()[: given.most]]
    megabytes = sum(len(r["text"].encode()) for r in rows) / 1e6
    print(f"{len(rows):,} documents, {megabytes:.1f} MB")
    harness.head("stage", "ours, MB/s", "datatrove", "times", "kept", "the same", "NeMo Curator", "times", "kept")
    for name in given.stages:
        curated = given.curator if name.startswith("gopher") else ""
        sides = {ours: sys.executable} | {
            side: python for side, python in ((theirs, given.datatrove), (curators, curated)) if python
        }
        tail = (name, str(given.corpus.absolute()), given.most)
        ways = {side.__name__: partial(harness.apart, side, *tail, python=python) for side, python in sides.items()}
        turns = harness.by_turns(ways, given.turns)
        paces = {side: megabytes / median(turn["seconds"] for turn, _ in made) for side, made in turns.items()}
        decisions = {side: made[0][0]["decisions"] for side, made in turns.items()}
        kept = {side: f"{sum(not reason for reason in made) / len(rows):.1%}" for side, made in decisions.items()}
        cells = [f"{paces['ours']:.2f}", "", "", kept["ours"], "", "", "", ""]
        others = list(differences(decisions["ours"], decisions["theirs"], rows)) if "theirs" in decisions else []
        if "theirs" in paces:
            cells[1:3] = f"{paces['theirs']:.2f}", f"{paces['ours'] / paces['theirs']:.1f}"
            cells[4] = f"{1 - len(others) / len(rows):.3%}"
        if "curators" in paces:
            cells[5:8] = f"{paces['curators']:.2f}", f"{paces['ours'] / paces['curators']:.1f}", kept["curators"]
        harness.row(name, *cells)
        print(*(others if given.differences else ()), sep="\n")
        if "theirs" in decisions:
            reasons = Counter((x, y) for x, y in zip(decisions["ours"], decisions["theirs"], strict=True) if x or y)
            print("   ", ", ".join(f"{x or 'kept'}/{y or 'kept'} {n}" for (x, y), n in reasons.most_common(12)))


if __name__ == "__main__":
    main()
