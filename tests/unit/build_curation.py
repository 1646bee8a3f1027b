"""Runs curation in this process, with the same tasks, keys, and records as on Ray. Tasks run in a shuffled order, and some run
twice."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from heliostat.curation.engine import Curated, StageEngine
from heliostat.curation.pieces import FilePart
from heliostat.curation.registry import parse
from heliostat.curation.segment import survivors
from heliostat.curation.stage import Document, Picture
from heliostat.storage.locations import Location
from heliostat.tasks import flow, spill
from heliostat.tasks.work import Work
from ray import cloudpickle

LETTERS = str.maketrans("0123456789", "abcdefghij")


def spelled(number: int) -> str:
    """Spells a number in letters, because comparisons ignore the digits of words."""
    return str(number).translate(LETTERS)


class KilledError(Exception):
    """Simulates the death of the driver."""


@dataclass
class HereFlow(flow.Flow):
    """Runs each task in this process, with pickled arguments. `seed` shuffles the tasks, and `again` is the share that runs
    twice. The run ends after `most` tasks."""

    seed: int = 0
    most: int = 1 << 60
    again: float = 0.3
    ran: list[str] = field(default_factory=list)

    def share(self, value: Any) -> Any:
        return value

    def nodes(self, resource: str = "CPU") -> list[int]:
        return [2] if resource == "CPU" else []

    def _running(self, kind, function, tasks, cpus=1, valid=lambda record: True, **pools) -> Iterator[tuple[int, dict[str, Any]]]:
        todo = list(self._looked_up(kind, tasks, valid))
        rng = random.Random(f"{self.seed} {kind}")
        rng.shuffle(todo)
        for number, task, record, _ in todo:
            if record is not None:
                self._count(self.kept, kind, record)
                yield number, record
                continue
            sent = cloudpickle.dumps((self.work, kind, task.key, function, task.arguments, task.shared))
            for time in range(1 + (rng.random() < self.again)):  # another time is a run's of its own, or it would do nothing
                work, *positional, shared = cloudpickle.loads(sent)
                made = flow.execute(work, f"{self.name} {time}", *positional, **shared)
            if len(self.ran) >= self.most:
                raise KilledError
            self.ran.append(kind)
            self._count(self.done, kind, made)
            self.progress.done(kind, made, task.bytes)
            yield number, made


@dataclass(frozen=True)
class Given:
    """Reads given documents: a part's path is the index of its text in `texts`."""

    by_text: ClassVar[bool] = True

    texts: dict[str, str]
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)

    def read(self, part: FilePart):
        columns = dict(self.columns.get(part.path, {}))
        yield Document(part.path, self.texts[part.path], columns, self.pictures.get(part.path))

    def finish(self, document: Document):
        return document


def curate(folder: Path, texts: dict[str, str], stages: list[dict[str, Any]], pieces: int | list[list[str]] = 5,
           memory_limit: int = 1 << 20, columns: dict[str, dict[str, Any]] | None = None,
           pictures: dict[str, Picture] | None = None, **flow_keys: Any) -> tuple[Curated, HereFlow]:  # fmt: skip
    """Runs texts, by id, through stages, distributed over some pieces or over the given pieces."""
    here = HereFlow(Work(Location(str(folder))), **flow_keys)
    engine = StageEngine(here, Given(texts, columns or {}, pictures or {}), ["given"], memory_limit)
    parts = {id: FilePart(id, len(text), 0) for id, text in texts.items()}
    dealt = [list(parts)[i::pieces] for i in range(pieces)] if isinstance(pieces, int) else pieces
    return engine.curate([[parts[id] for id in piece] for piece in dealt if piece], [parse(entry) for entry in stages]), here


def left(found: Curated, here: HereFlow) -> dict[str, str]:
    """Returns the remaining documents, by id."""
    tables = (t for run in found.runs for t in survivors(here.work.spill, run))
    return {row["id"]: row["text"] for table in tables for row in table.to_pylist()}


def left_out(found: Curated, here: HereFlow) -> dict[str, tuple[str, str, str]]:
    """Returns (stage, reason, detail) of each dropped document, by id."""
    tables = (t for name in found.left_out for t in spill.read(here.work.spill, name))
    return {row["id"]: (row["stage"], row["reason"], row["detail"]) for table in tables for row in table.to_pylist()}
