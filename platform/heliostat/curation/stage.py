"""Defines a curation stage, which processes one document: a schema of YAML keys and a function on a batch of documents.

A stage processes each document alone, so its result doesn't depend on the batch, the worker, or the order. Only a `GlobalStage`
compares documents. Each file in `heliostat.curation.stages` defines the stage with the file's name (`gopher_quality.py`: `{stage:
gopher_quality}`) in one subclass of `Stage`. The class's fields are the stage's keys in a pipeline file, with the paper's values
as defaults. Each worker calls `open` once, which loads models and lists, and returns the function that processes documents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from pydantic import model_validator

from heliostat import extras
from heliostat.errors import ConfigError
from heliostat.schema import Strict
from heliostat.tasks import files
from heliostat.tasks.libraries import versions

if TYPE_CHECKING:
    from heliostat.tasks.flow import Flow
    from heliostat.tasks.spill import SpilledRun


@dataclass(frozen=True, slots=True)
class Picture:
    """Holds an image in the form of its source or, when `hash` is set, in the form that shards store.

    `hash`: SHA-256 of the decoded pixels; `looks`: the perceptual hash; `size`: width and height of the stored form.
    """

    data: bytes
    hash: bytes = b""
    looks: int = 0
    size: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Document:
    """Holds a document in curation. `text` is the bytes that were read, until a stage extracts text from these bytes.

    `id`: where the document was read (`path#record`). `columns` (`url`, `date`, `source`, `license`, ...) accompany the document
    to the shard. For an image with a caption, `text` is the caption.
    """

    id: str
    text: str | bytes
    columns: dict[str, Any] = field(default_factory=dict)
    picture: Picture | None = None


@dataclass(slots=True)
class Outcome:
    """Holds a stage's result for one document. For a dropped document, the document is None, and `reason` is one of the stage's
    reasons.

    `measures`: the numbers on which the decision depends, for kept and dropped documents. The funnel plots them with the
    thresholds. `counts`: changes to a kept document, such as lines removed or addresses masked.
    """

    document: Document | None
    reason: str = ""
    detail: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """Reports a dropped document or file, with the reason."""

    id: str
    reason: str
    detail: str = ""


Work = Callable[[list[Document]], list[Outcome]]
Judge = Callable[[str], tuple[str, dict[str, float]]]
"""Returns the reason to drop a text ("" keeps the text), and the measures on which the decision depends."""


def text_of(document: Document) -> str:
    """Returns a document's text. Raises ConfigError if the document still has bytes instead of text."""
    if isinstance(document.text, bytes):
        raise ConfigError(f"stages: {document.id} is bytes, not text. Put `extract` or `pdf` before the stages that read text")
    return document.text


def by_text(judge: Judge) -> Work:
    """Builds a stage's function from `judge`, which returns the reason to drop a text, or "". The function keeps each document
    unchanged, or drops it."""

    def work(documents: list[Document]) -> list[Outcome]:
        judged = [judge(text_of(document)) for document in documents]
        return [Outcome(None if why else d, why, measures=m) for d, (why, m) in zip(documents, judged, strict=True)]

    return work


def first_failed(*rules: tuple[bool, str]) -> str:
    """Returns the reason of the first rule that failed; "" if no rule failed."""
    return next((reason for failed, reason in rules if failed), "")


@runtime_checkable
class Decides(Protocol):
    """Describes a stage that keeps or drops each document without loading models or lists."""

    def decide(self, document: Document) -> Outcome:
        """Keeps or drops one document; returns the outcome."""


class Stage(Strict):
    """Defines a stage. The fields of a subclass are the stage's keys in a pipeline file, and the methods of a subclass process
    documents."""

    reasons: ClassVar[dict[str, str]] = {}
    """Reasons for which the stage drops documents: reason -> meaning."""
    thresholds: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Measures that decide whether a document is kept: measure -> the fields with the measure's thresholds."""
    limits: ClassVar[dict[str, tuple[str, str, str]]] = {}
    """Rules that compare one measure with one field, in order of precedence: reason -> (measure, field, meaning).

    A field `min_...` is the minimum for keeping a document, and a field `max_...` is the maximum. `{}` in the meaning stands for
    the field's name. Limits are added to `reasons` and `thresholds` automatically.
    """
    needs: ClassVar[tuple[str, ...]] = ()
    """An extra of heliostat, followed by the modules of the extra that the stage needs."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Python distributions on which the result depends. If the version of one of these distributions changes, the stage's tasks
    run again."""
    gpu: ClassVar[bool] = False
    """Whether the stage runs a model. If the cluster has GPUs, the stage runs in actors with a GPU each (`streaming`). Otherwise
    it runs in its own tasks."""
    of_images: ClassVar[bool] = False
    """Whether the stage reads images instead of captions."""
    changes: ClassVar[bool] = False
    """Whether the stage may change a document's text. Other stages only keep or drop documents."""
    version: ClassVar[int] = 1
    """Version of the stage's results. Increase it if a change of the code gives different documents for the same keys:
    heliostat then computes the results again."""

    makes: ClassVar[tuple[str, ...]] = ()
    """Columns that the stage adds to documents, in addition to the columns in the stage's keys `column`, `bucket_column`, and
    `original`."""
    compares: ClassVar[tuple[str, ...]] = ()
    """Keys that name a column whose values the stage compares. Documents must have this column."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Keys that name files or folders, such as a model. `shipping` copies these files to the nodes of the tasks."""
    later: ClassVar[frozenset[str]] = frozenset()
    """Keys that newer versions of heliostat added. A dataset from before such a key is up to date if the key has its default."""

    @classmethod
    def __pydantic_init_subclass__(cls, **options: object) -> None:
        fields: dict[str, tuple[str, ...]] = {}
        for measure, name, _ in cls.limits.values():
            fields[measure] = (*fields.get(measure, ()), name)
        cls.thresholds = cls.thresholds | fields
        cls.reasons = cls.reasons | {reason: meaning.format(name) for reason, (_, name, meaning) in cls.limits.items()}

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        """Rejects a minimum above the maximum of the same measure, with which no document could pass."""
        for low in (name for name in type(self).model_fields if name.startswith("min_")):
            high = low.replace("min_", "max_", 1)
            least, most = getattr(self, low), getattr(self, high) if high in type(self).model_fields else None
            if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
                raise ValueError(f"{low} {least:,} is above {high} {most:,}. Lower {low}, or raise {high}")
        return self

    @classmethod
    def named(cls) -> str:
        """Returns the stage's name in a pipeline file, which is the name of the module."""
        return cls.__module__.rpartition(".")[2]

    def identity(self) -> dict[str, object]:
        """Returns everything that the stage's result depends on: name, version, keys, and digests of the files in its keys."""
        usual = {key for key in self.later if getattr(self, key) == type(self).model_fields[key].default}
        entry = {key: value for key, value in self.entry().items() if key not in usual}
        return {"version": self.version, **entry, **self.digests()}

    def digests(self) -> dict[str, object]:
        """Returns the part of the identity for the keys in `paths`: a digest for each file. Stages whose key is a folder override
        this method."""
        return {key: files.mapped(getattr(self, key), partial(_digest, key)) for key in self.paths}

    def named_paths(self) -> Iterator[tuple[str, str]]:
        """Yields (key, path) for each path in the keys of `paths`. A key's value is a path, a list of paths, or a mapping of
        names to paths."""
        for key in self.paths:
            value = getattr(self, key)
            paths = value.values() if isinstance(value, dict) else [value] if isinstance(value, str) else value or ()
            yield from ((key, path) for path in paths)

    def located(self, places: Mapping[str, str]) -> Self:
        """Returns the stage with its paths replaced by their locations on this node."""
        return self.model_copy(update={key: files.mapped(getattr(self, key), places.__getitem__) for key in self.paths})

    def follows(self) -> dict[str, object]:
        """Returns everything that the stage's tasks depend on: the identity, and the libraries' versions."""
        return {**self.identity(), "libraries": self.library_versions()}

    @classmethod
    def library_versions(cls) -> dict[str, str]:
        """Returns the versions of the stage's libraries, and of Python's Unicode data."""
        return versions(cls.libraries)

    def entry(self) -> dict[str, object]:
        """Returns the stage's entry in a pipeline file, with all keys."""
        return {"stage": self.named(), **self.model_dump(mode="json")}

    def edits(self) -> bool:
        """Checks whether the stage, with its keys, may change a document's text."""
        return self.changes

    def made(self) -> set[str]:
        """Returns the names of the columns that the stage adds to documents."""
        keys = {"column", "bucket_column", "original"} - {*self.compares}
        return {*self.makes, *(name for key in keys if (name := getattr(self, key, None)))}

    def stored(self) -> tuple[str, ...]:
        """Returns the names of the stage's columns that image shards keep."""
        return ()

    def check(self) -> None:
        """Checks everything that can be checked before the start, such as the files in the stage's keys; ConfigError for a
        problem."""
        if self.needs:
            extras.require(*self.needs, what=f"stage {self.named()}")

    def failed(self, measures: Mapping[str, float]) -> str:
        """Returns the reason of the first limit in `limits` that the measures violate; "" if the measures violate no limit."""
        for reason, (measure, name, _) in self.limits.items():
            limit, value = getattr(self, name), measures.get(measure)
            if limit is None or value is None:
                continue
            if value < limit if name.startswith("min_") else value > limit:
                return reason
        return ""

    def judged(
        self,
        document: Document,
        measures: dict[str, float],
        counts: dict[str, int] | None = None,
        columns: Mapping[str, object] = MappingProxyType({}),
    ) -> Outcome:
        """Drops the document if its measures violate the limits. Otherwise keeps the document, with the additional columns."""
        reason = self.failed(measures)
        if not reason:
            document.columns |= columns
        return Outcome(None if reason else document, reason, measures=measures, counts=counts or {})

    def open(self) -> Work:
        """Loads the stage's models and lists, and returns the stage's function. The function maps a batch of documents to one
        outcome per document, in order."""
        decide = self.loaded()
        return lambda documents: [decide(document) for document in documents]

    def loaded(self) -> Callable[[Document], Outcome]:
        """Loads the stage's models and lists, and returns the stage's function for a single document. `open` returns the function
        for batches."""
        Stage.check(self)  # on this node, because `decide` may take a missing module for bad data
        if not isinstance(self, Decides):
            raise ConfigError(
                f"stage {self.named()}: {type(self).__name__} doesn't define `decide`. Add this method (docs/guides/filter.md)"
            )
        return self.decide


def _digest(key: str, path: str) -> str:
    return path if Path(path).is_dir() else files.digest(key, path)


class GlobalStage(Stage):
    """Defines a stage that compares documents. Such a stage runs its own tasks between the tasks of other stages, and has no
    function for batches."""

    @abstractmethod
    def compare(self, flow: Flow, curated: Any, number: int, memory_limit: int) -> list[SpilledRun]:
        """Compares the documents in `curated`. Returns the temporary files of these documents, without the dropped documents.

        `number`: the stage's number. The method adds the dropped documents and the stage's tally to `curated`.
        """
