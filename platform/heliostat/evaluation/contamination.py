"""Measures the share of each task's examples that has n-grams in common with the training data (Brown et al. 2020, appendix C).

By default, an n-gram has 13 words. The n-grams of all examples are in memory. The shards are read once, for all tasks together.
An example's text is its question and its right answer. A document that is in several chunks is compared chunk by chunk, so
n-grams across a chunk boundary are missed.
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

Shown = Callable[[int, int], None]  # (number of chunks that were read, number of all chunks)


@dataclass(frozen=True)
class Training:
    """Contains the datasets that a model was trained on, each with the numbers of the chunks to compare."""

    sources: list[tuple[Manifest, np.ndarray]]

    @property
    def facts(self) -> list[dict[str, object]]:
        """Describes each dataset: its location, its digest, and the number of its chunks that are compared."""
        return [{"data": str(m.location), "digest": m.digest, "chunks": len(c), "of": len(m.chunks)} for m, c in self.sources]


def of_model(folder: Path) -> Training:
    """Opens the datasets that an exported model was trained on. Leaves out the held-out chunks.

    Raises ConfigError if the model's folder doesn't record the datasets.
    """
    export = exported.read(folder)
    if export.job is None:
        raise ConfigError(f"{folder}: the model's folder doesn't name the training data. Set contamination.data in the suite")
    data, evaluated = export.job["data"], export.job.get("evaluate")
    held_out = evaluated.get("fraction", 0.01) if evaluated else 0.0
    version = {"version": export.data_version} if export.data_version else {}
    sources = []
    for source in data["sources"]:
        dataset = documents.open_text(Location(source["path"]).absolute(workspace.root()), chats=True)
        sources.append((dataset, documents.trained(dataset, data.get("sequence_length"), held_out, **version)))
    return Training(sources)


def of_datasets(paths: Sequence[str]) -> Training:
    """Opens the datasets at these paths, with all their chunks."""
    opened = [documents.open_text(Location(path).absolute(workspace.root()), chats=True) for path in paths]
    return Training([(dataset, np.arange(len(dataset.chunks))) for dataset in opened])


@dataclass
class Examples:
    """Contains the n-grams (uint64 hashes) of all tasks' examples. `seen`: the n-grams that are also in the training data."""

    n: int
    grams: dict[str, list[np.ndarray]] = field(default_factory=dict)
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    def add(self, task: str, texts: Iterable[str]) -> None:
        self.grams[task] = decontamination.grams(list(texts), self.n)

    def look_through(self, training: Training, shown: Shown = lambda done, all_: None) -> list[str]:
        """Searches the training data for the n-grams of the examples, and adds the n-grams that occur in the training data to
        `seen`.

        Returns an error for each chunk that can't be read.
        """
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
        """Returns, for each example, the share of its n-grams that are in the training data. Returns None for an example with
        fewer than `n` words."""
        return [float(np.isin(grams, self.seen).mean()) if len(grams) else None for grams in self.grams[task]]


def summary(shares: Sequence[float | None], values: Sequence[float], score: float) -> dict[str, object]:
    """Summarizes a task: the share of contaminated examples, and the score of the clean examples.

    A contaminated example has at least one n-gram in the training data. Examples that are too short to compare are neither
    contaminated nor clean. `values`: each example's own score. `clean_score` is None if `score` isn't the mean of `values`.
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
    """Searches the training data for the examples' n-grams. Returns a description of the searched datasets. If no dataset is
    known, `unknown` has the reason.

    `data`: paths of datasets. By default, these are the datasets that the model was trained on. Raises HeliostatError if a
    dataset in `data` can't be opened.
    """
    try:
        training = of_datasets(data) if data else of_model(folder)
        damaged = examples.look_through(training, shown)
    except HeliostatError as e:
        if data:
            raise
        return {"n": examples.n, "datasets": [], "damaged": 0, "unknown": brief(e)}
    return {"n": examples.n, "datasets": training.facts, "damaged": len(damaged), "unknown": ""}
