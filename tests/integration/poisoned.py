"""Curates texts, two of which end the process that stores them: one after the first filter, the other after scoring.

    python -m tests.integration.poisoned FOLDER MODEL

Prints the remaining documents, the dropped documents with (stage, reason), and the number of tasks that the stream finished.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from heliostat.cluster.connect import connect
from heliostat.curation.engine import StageEngine
from heliostat.curation.pieces import FilePart
from heliostat.curation.registry import parse
from heliostat.curation.stage import Document
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow
from heliostat.tasks.work import Work

from tests.unit.build_curation import left, left_out
from tests.unit.build_model import texts

FIRST, LATER = "d033", "d048"  # the documents that end a process


@dataclass(frozen=True)
class PoisonedSource:
    """Reads given texts; a part's path is the id of its text."""

    by_text: ClassVar[bool] = False

    texts: dict[str, str]

    def read(self, part: FilePart):
        yield Document(part.path, self.texts[part.path])

    def finish(self, document: Document) -> Document:
        if document.id == FIRST or (document.id == LATER and "score" in document.columns):
            os._exit(1)
        return document


def main(folder: Path, model: str) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    connect(cpus=1)
    given = {f"d{i:03}": text for i, text in enumerate(texts(120))}
    flow, parts = Flow(Work(Location(str(folder)))), [FilePart(id, len(text), 0) for id, text in given.items()]
    score = {"stage": "hf_classifier", "model": model, "label": "good", "max_tokens": 64, "min_score": 0.1}
    stages = [parse({"stage": "length", "min_chars": 5}), parse(score)]
    curated = StageEngine(flow, PoisonedSource(given), ["given"], 1 << 24).curate([parts[i::12] for i in range(12)], stages)
    dropped = {id: [stage, reason] for id, (stage, reason, _) in left_out(curated, flow).items()}
    done = len(list((folder / "done").glob("stream/*")))
    sys.stdout.write(json.dumps({"left": left(curated, flow), "dropped": dropped, "streamed": done}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
