"""Runs documents through the stages that process each document alone."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from heliostat.curation import registry, tally
from heliostat.curation.stage import Document, Dropped, Stage, Work
from heliostat.errors import ConfigError, HeliostatError
from heliostat.storage.locations import Location
from heliostat.tasks import cpu_time, shipping
from heliostat.tasks.shipping import Shipment
from heliostat.tasks.work import key

Entry = tuple[dict[str, Any], str, tuple[Shipment, ...]]
"""Three values: a stage's entry in a pipeline file, the digest of everything that the stage depends on, and the files that the
entry lists."""
Gone = tuple[str, str, str, str, dict[str, float], dict[str, Any]]
BATCH, BATCH_CHARS = 64, 1 << 20  # maximum documents, and their characters, in a stage's batch
COMPILED_WITH = "A text with which each stage calls all of its compiled functions."
IMAGE_SHARE = 32  # bytes of an image that count as one character: an image is a few hundred times larger than a text


def batches(documents: Iterable[Document | Dropped]) -> Iterator[tuple[list[Document], list[Dropped]]]:
    """Groups documents into batches. Yields (documents to process, dropped documents that were read between these documents)."""
    waiting, dropped, size = list[Document](), list[Dropped](), 0
    for item in documents:
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            waiting.append(item)
            size += len(item.text) + (len(item.picture.data) // IMAGE_SHARE if item.picture else 0)
        if size >= BATCH_CHARS or len(waiting) + len(dropped) >= BATCH:
            yield waiting, dropped
            waiting, dropped, size = [], [], 0
    if waiting or dropped:
        yield waiting, dropped


class Chain:
    """Runs documents through a list of stages, and counts each stage's kept and dropped documents in `tally`. `first`: the number
    of the first stage."""

    def __init__(self, folder: Location, stages: list[Entry], first: int = 0) -> None:
        self.stages: list[tuple[str, Stage, Work]] = []
        for number, (entry, follows, shipments) in enumerate(stages, first):
            stage = registry.parse(entry)
            located = stage.located({one.path: shipping.here(folder, one) for one in shipments})
            work = _opened(json.dumps(located.entry()), follows)
            self.stages.append((tally.label(number, stage), stage, work))
        self.tally: tally.Tally = {}

    def run(
        self, documents: list[Document], about: Callable[[str], None] = lambda stage: None
    ) -> tuple[list[Document], list[Gone]]:
        """Returns the kept documents, and (id, stage, reason, detail, measures, columns) of each dropped document. Calls
        `about` with each stage's name before the stage runs."""
        dropped, sizes = [], [bytes_of(d) for d in documents] if self.stages else []
        for name, stage, work in self.stages:
            if not documents:
                break
            about(name)
            start = cpu_time.now()
            before = [Document(d.id, d.text, d.columns, d.picture) for d in documents]  # a stage may change a document in place
            outcomes = work(documents)
            tally.entry(self.tally, name)["seconds"] += cpu_time.now() - start
            if len(outcomes) != len(documents):
                raise HeliostatError(
                    f"stage {name!r} returned {len(outcomes)} outcomes for {len(documents)} documents. "
                    "Return one outcome per document"
                )
            documents, had, sizes = [], sizes, []
            for old, size, outcome in zip(before, had, outcomes, strict=True):
                after = 0 if outcome.document is None else _bytes_after(outcome.document, old, size)
                tally.count(self.tally, name, stage, old, outcome, (size, after))
                if outcome.document is None:
                    dropped.append((old.id, name, outcome.reason, outcome.detail, outcome.measures, old.columns))
                else:
                    documents.append(outcome.document)
                    sizes.append(after)
        return documents, dropped


def _bytes_after(document: Document, old: Document, size: int) -> int:
    """Returns the size of a document after a stage in bytes: `size`, its size before, unless the stage changed its content."""
    return size if document.text is old.text and document.picture is old.picture else bytes_of(document)


def bytes_of(document: Document) -> int:
    """Returns the size of a document in bytes: its text in UTF-8 plus its image."""
    text, picture = document.text, len(document.picture.data) if document.picture else 0
    return picture + (len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode("utf-8", "surrogatepass")))


@lru_cache(maxsize=64)
def _opened(entry: str, follows: str) -> Work:
    """Opens a stage once per process. Later tasks with the same stage reuse the stage's models and lists. Compiles the stage's
    loops, so that these seconds count as opening, and not as the first documents' work."""
    stage = registry.parse(json.loads(entry))
    if key(stage.follows()) != follows:
        raise ConfigError(
            f"stages: {stage.named()}: the stage's files or libraries on node {socket.gethostname()} differ from those at "
            "the start. Install the same files and libraries on every node, don't change them during the run, and run the "
            "command again"
        )
    work = stage.open()
    if "numba" in stage.needs:
        work([Document("", COMPILED_WITH)])
    return work
