"""Finds how much of each task's examples is in the training data: shared n-grams of 13 words (Brown et al. 2020, appendix C).

The n-grams of all examples are in memory, and the shards are read once, whatever the number of tasks. Of an example counts its
question and its right answer. A document that lies in several chunks is compared part by part, so that n-grams across the cut are
not found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from heliostat.config import workspace
from heliostat.curation import decontamination
from heliostat.curation.decontamination import NgramIndex
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, HeliostatError
from heliostat.evaluation import documents
from heliostat.recipes import exported
from heliostat.storage.locations import Location
from heliostat.text import brief

Shown = Callable[[int, int], None]  # (chunks that are read, all)


@dataclass(frozen=True)
class Training:
    """Holds the datasets that a model was trained on, and which of their chunks."""

    sources: list[tuple[Manifest, np.ndarray]]

    @property
    def facts(self) -> list[dict[str, object]]:
        """Describes each dataset: its place, digest, and how many of its chunks are compared."""
        return [{"data": str(m.location), "digest": m.digest, "chunks": len(c), "of": len(m.chunks)} for m, c in self.sources]


def of_model(folder: Path) -> Training:
    """Opens the datasets that an exported model was trained on, without what was held out; ConfigError if it does not say."""
    export = exported.read(folder)
    if export.job is None:
        raise ConfigError(f"{folder}: doesn't record its training data. Name it in contamination.data")
    data, evaluated = export.job["data"], export.job.get("evaluate")
    held_out = evaluated.get("fraction", 0.01) if evaluated else 0.0
    version = {"version": export.data_version} if export.data_version else {}
    sources = []
    for source in data["sources"]:
        dataset = documents.open_text(Location(source["path"]).absolute(workspace.root()))
        sources.append((dataset, documents.trained(dataset, data["sequence_length"], held_out, **version)))
    return Training(sources)


def of_datasets(paths: Sequence[str]) -> Training:
    """Opens datasets that are named, all of each."""
    opened = [documents.open_text(Location(path).absolute(workspace.root())) for path in paths]
    return Training([(dataset, np.arange(len(dataset.chunks))) for dataset in opened])


@dataclass
class Examples:
    """Holds the n-grams of all tasks' examples; `seen`: those that training data has."""

    n: int
    grams: dict[str, list[np.ndarray]] = field(default_factory=dict)
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, task: str, texts: Iterable[str]) -> None:
        self.grams[task] = decontamination.grams(list(texts), self.n)

    def look_through(self, training: Training, shown: Shown = lambda done, all_: None) -> list[str]:
        """Looks for the n-grams in the training data; returns what could not be read."""
        every = [grams for task in self.grams.values() for grams in task if len(grams)]
        hashes = np.unique(np.concatenate(every)) if every else np.zeros(0, np.uint64)
        index, damaged = NgramIndex(hashes, np.zeros(0, np.int32), []), list[str]()
        total, done, seen = sum(len(chunks) for _, chunks in training.sources), 0, np.zeros(len(hashes), bool)
        for dataset, chunks in training.sources:
            read = documents.Documents(dataset)
            for texts in read.texts(chunks):
                for grams in decontamination.grams(list(texts), self.n):
                    seen[np.searchsorted(hashes, grams[index.hits(grams)])] = True
                done += 1
                shown(done, total)
            damaged += read.damaged
        self.seen = hashes[seen]
        return damaged

    def shares(self, task: str) -> list[float | None]:
        """Returns the share of each example's n-grams that are in the training data; None of one that is too short."""
        return [float(np.isin(grams, self.seen).mean()) if len(grams) else None for grams in self.grams[task]]


def summary(shares: Sequence[float | None], values: Sequence[float], score: float) -> dict[str, object]:
    """Sums up a task: the share of the compared examples that have an n-gram of the training data, and the score of the rest;
    what is too short to be compared is in neither.

    `values`: each example's own score; the score of the clean ones is null if the task's `score` is not the mean of these.
    """
    known = [share for share in shares if share is not None]
    clean = [value for share, value in zip(shares, values, strict=True) if share == 0]
    mean = all(isinstance(v, int | float) for v in values) and math.isclose(sum(values) / len(values), score, abs_tol=1e-9)
    return {
        "compared": len(known),
        "too_short": len(shares) - len(known),
        "contaminated": sum(share > 0 for share in known) / len(known) if known else None,
        "overlap": sum(known) / len(known) if known else None,
        "clean_examples": len(clean),
        "clean_score": sum(clean) / len(clean) if clean and mean else None,
    }


def measured(examples: Examples, folder: Path, data: Sequence[str], shown: Shown) -> dict[str, object]:
    """Looks the examples up in the training data; says what was compared, or why nothing was."""
    try:
        training = of_datasets(data) if data else of_model(folder)
        damaged = examples.look_through(training, shown)
    except HeliostatError as e:
        if data:
            raise
        return {"n": examples.n, "datasets": [], "damaged": 0, "unknown": brief(e)}
    return {"n": examples.n, "datasets": training.facts, "damaged": len(damaged), "unknown": ""}
