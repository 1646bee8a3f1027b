"""Runs one of datatrove's filters over a JSONL: a program of `curation_stages.py`, run by a Python that has
`datatrove[processing,io]` and spaCy. Prints one JSON object: CPU seconds, and for each document the reason why it is dropped,
or nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def build(name: str):
    from datatrove.pipeline import filters
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

    if name == "extract":
        work = Trafilatura().extract
    elif name == "fix_text":
        work = FTFYFormatter().format
    elif name == "pii":
        work = PIIFormatter().format
    else:
        kinds = {"gopher_quality": filters.GopherQualityFilter, "gopher_repetition": filters.GopherRepetitionFilter,
                 "c4": filters.C4QualityFilter, "fineweb": filters.FineWebQualityFilter}  # fmt: skip
        return kinds[name]().filter
    return lambda document: (True, work(document.text))


def main(name: str, path: str, most: int) -> None:
    from datatrove.data import Document

    texts = [json.loads(line)["text"] for line in Path(path).read_text().splitlines()[:most]]
    work = build(name)
    work(Document(text="Some words to begin with. " * 30, id="0"))
    decisions, start = [], time.process_time()
    for i, text in enumerate(texts):
        try:
            found = work(Document(text=text, id=str(i)))
        except Exception as e:  # noqa: BLE001 - told as its decision
            found = (False, f"error: {type(e).__name__}")
        decisions.append(
            ""
            if found is True or (isinstance(found, tuple) and found[0])
            else found[1]
            if isinstance(found, tuple)
            else "dropped"
        )
    print(json.dumps({"seconds": time.process_time() - start, "decisions": decisions}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
