"""Makes a text dataset: reads and curates, trains the tokenizer, writes the shards, and sums what was done for the manifest."""

from __future__ import annotations

import base64
import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from heliostat.curation import pieces, readers, reasons, segment, tally
from heliostat.curation.engine import RUN_SHARE, Curated, StageEngine, groups
from heliostat.curation.explaining import explain
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import SpilledRun
from heliostat.curation.stage import Stage
from heliostat.curation.text import documents, gathering, infilling, sources, tasks, tokens
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.infilling import FillInTheMiddle
from heliostat.curation.text.tasks import TextSharding, TextSource
from heliostat.data import versions
from heliostat.data.infilling import COUNTS, FACT, OWN, find
from heliostat.data.manifest import FILES, SHARDS
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, merging, spill
from heliostat.tasks.exchange import by_parts
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

log = logging.getLogger(__name__)

SAMPLERS = 64  # tasks, at most, that measure and select what trains the tokenizer
SHARD_SHARE = 6  # a shard's task holds its texts, its tokens and its file
ALONE = 256  # shards, up to which each has a task of its own


@dataclass
class Reading:
    """Reads an input, and trains a tokenizer on what its stages leave; the fields are keys of a pipeline."""

    flow: Flow
    source: TextSource
    output: Location
    tokenizer: dict[str, Any]
    given: str | None
    stages: list[Stage]
    memory_limit: int

    def _pieces(self, inputs: list[InputFile]) -> Iterator[list[FilePart]]:
        target = self.flow.work.begin(pieces.size(sum(f.bytes for f in inputs)))
        return pieces_of(self.flow, self.source.input, inputs, target)

    def _train(self, curated: Curated, markers: tuple[str, ...] = ()) -> str:
        """Trains a tokenizer on the documents of the lowest hashes, up to train_bytes: the same sample from any runs.
        `markers`: other special tokens."""
        parts = list(groups(curated.runs, max(1, -(-len(curated.runs) // SAMPLERS))))
        follows = [[[run.name, run.decided] for run in part] for part in parts]
        measure = (Task(key("sizes", f), {"runs": part}) for f, part in zip(follows, parts, strict=True))
        sizes = np.zeros(tasks.PREFIXES, np.int64)
        for record in self.flow.all("sizes", tasks.prefix_sizes, measure):
            for table in spill.read(self.flow.work.spill, record["sizes"]):
                sizes[table["key"].to_numpy()] += table["bytes"].to_numpy()
        limit = int(np.searchsorted(np.cumsum(sizes), self.tokenizer["train_bytes"]))
        select = (Task(key("sample", f, limit), {"runs": part, "limit": limit}) for f, part in zip(follows, parts, strict=True))
        samples = [name for record in self.flow.all("sample", tasks.lowest, select) for name in record["sample"]]
        config = self.tokenizer | ({"markers": markers} if markers else {})
        told = {"samples": samples, "limit": limit, "bytes": int(sizes[: limit + 1].sum()), "config": config}
        train = Task(key("tokenizer", told, libraries.versions(["tokenizers"])), told)
        (record,) = self.flow.all("tokenizer", tasks.train_on, iter([train]))
        return segment.load(self.flow.work.spill, record["definition"])

    def _listed(self, curated: Curated) -> list[str] | None:
        rows = sum(number for reason, number in curated.reasons.items() if ": " not in reason)  # not of stages
        return listed(self.flow, rows, curated.left_out, self.output) if rows else None


@dataclass
class TextMaking(Reading):
    """Makes the dataset of one pipeline; the fields are its keys."""

    shard_bytes: int
    chunk_tokens: int
    infill: FillInTheMiddle | None = None
    together: Together | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each stage, afterwards; of the work that earlier runs have done, too."""
    counted: tally.Tally = field(default_factory=dict)
    """What the stages did, afterwards."""

    @property
    def explained(self) -> bool:
        """Tells whether the dataset says what became of each document."""
        return bool(self.stages)

    def run(self, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Writes everything but the manifest, and returns its rows and metadata."""
        curated = self.curated(inputs)
        definition = self.given if self.given is not None else self._train(curated, OWN if self.infill else ())
        infill = self._infill(tokens.load(definition))
        definition = infilling.marking(definition, infill["names"]) if infill else definition
        tokenizer = tokens.load(definition)
        end = tokens.end_id(tokenizer, self.tokenizer["end_of_document"])
        beside = {"tokenizer.json": versions.store(self.output, f"{FILES}/tokenizer-", definition.encode(), ".json")}
        totals = Totals(tokenizer.get_vocab_size(), curated.reasons, curated.examples)
        ends, came = list(curated.left_out), curated.bytes  # exact duplicates among them, which regrouping leaves out
        if self.together is not None:
            ends += self._regrouped(curated, self.together, totals)
        for record in self._shards(curated, definition, end, infill):
            ends += record["ends"]
            for shard in record["shards"]:
                totals.add(shard)
        self._log(totals)
        meta = {"dropped": dict(sorted(totals.dropped.items())), "listed": self._listed(curated)}
        if not totals.chunks:
            return [], meta
        return totals.chunks, meta | {
            "kind": "tokens",
            "files": beside,
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "vocab_size": tokenizer.get_vocab_size(),
            "end_of_document": end,
            "documents": totals.documents,
            "duplicates": totals.duplicates,
            **({"cuts": totals.cut} if totals.cut else {}),
            **({FACT: infill, COUNTS: dict(totals.rearranged)} if infill else {}),
            **({"together": {**self.together.model_dump(), **totals.together}} if self.together else {}),
            "bytes": totals.bytes,
            "unigram_entropy": tokens.entropy(totals.counts),
            **(self._explained(curated, totals, sorted(ends), came) if self.explained else {}),
        }

    def curated(self, inputs: list[InputFile]) -> Curated:
        """Reads the input and takes it through the stages."""
        engine = StageEngine(self.flow, self.source, [self.source.input, vars(self.source.rules)], self.memory_limit)
        return engine.curate(self._pieces(inputs), self.stages, self.explained)

    def _infill(self, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Returns what the manifest says of how texts are rearranged: the keys, and the markers' names and ids."""
        if self.infill is None:
            return None
        names = infilling.names(tokenizer)
        return {**self.infill.model_dump(), "names": list(names), "markers": list(astuple(find(tokenizer, names)))}

    def _log(self, totals: Totals) -> None:
        totals.log(self.stages, self.together)

    def _regrouped(self, curated: Curated, together: Together, totals: Totals) -> list[str]:
        """Puts runs of documents that belong together in place of the stages'; returns spills of the exact duplicates' ends."""
        parts = max(1, -(-curated.bytes * RUN_SHARE // self.memory_limit))
        told = {"by": together.model_dump(), "explained": self.explained}
        records = self.flow.all("regroup", gathering.regroup, self._ranged(curated.runs, parts, **told))
        curated.runs = [SpilledRun(*run) for record in records for run in record["runs"]]
        self._check_largest(curated.runs, together, parts)
        totals.duplicates += sum(record["duplicates"] for record in records)
        return [name for record in records for name in record["ends"]]

    def _in_ranges(self, runs: list[SpilledRun], parts: int) -> list[merging.ShardRange]:
        """Merges runs where each of so many equal ranges of hashes would have little of them."""
        most = self.memory_limit // RUN_SHARE
        return merging.merged(self.flow, runs, parts, lambda first, stop: tasks.bounds(first, parts, stop), most)

    def _ranged(self, runs: list[SpilledRun], parts: int, **more: Any) -> Iterator[Task]:
        """Describes a task for each of so many equal ranges of hashes, over runs."""
        for one in self._in_ranges(runs, parts):
            follows, shared = key([[run.name, run.decided] for run in one.runs], more), {"runs": self.flow.share(one.runs)}
            for part in range(one.first, one.stop):
                low, high = tasks.bounds(part, parts)
                yield Task(key(follows, low, high), {"low": low, "high": high, **more}, shared, int(one.part * len(one.runs)))

    def _check_largest(self, runs: list[SpilledRun], together: Together, parts: int) -> None:
        """Raises ConfigError if the documents of one value, which one shard holds, are more than its task has memory for."""
        work = self._ranged(runs, parts, column=together.column)
        found = max(self.flow.all("largest", gathering.largest, work), key=lambda record: record["bytes"])
        needs = found["bytes"] * SHARD_SHARE
        if needs > self.memory_limit:
            raise ConfigError(
                f"together.column: {together.column!r}: the documents of {found['value']!r} have {found['bytes']:,} bytes, and "
                f"lie in one shard, whose task takes {SHARD_SHARE} times as much memory, more than memory_limit "
                f"({self.memory_limit:,}); give a memory_limit of {needs:,}, name a column with smaller groups, or leave that "
                "value's documents without one"
            )

    def _explained(self, curated: Curated, totals: Totals, ends: list[str], came: int) -> dict[str, Any]:
        """Writes the funnel and what became of each document; returns what the manifest says of them."""
        shard = {"documents": totals.documents + totals.duplicates, "kept": totals.documents, "kept_bytes": totals.bytes,
                 "bytes": came, "dropped": {"duplicate": totals.duplicates} if totals.duplicates else {},
                 "counts": {"tokens": int(totals.counts.sum())}}  # fmt: skip
        rows = totals.documents + totals.duplicates + sum(totals.dropped.values())
        columns = list(self.source.rules.columns)
        made = explain(self.flow, self.stages, curated.tallies, shard, ends, rows, columns, self.output)
        self.counted, self.seconds = made.total, made.seconds
        return made.meta

    def _shards(self, curated: Curated, definition: str, end: int, infill: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """Writes the shards; where there are many, a task writes as many as have room in its memory, one after another."""
        shards = max(1, round(curated.bytes / self.shard_bytes))
        plan = TextSharding(
            self.output.uri, shards, definition, end, self.chunk_tokens, self.explained, infill, bool(self.together) or None
        )
        told = {name: value for name, value in vars(plan).items() if value is not None}
        each = min(max(1, self.memory_limit // 4 // self.shard_bytes), -(-shards // ALONE))
        reads, shared = curated.bytes * each // shards, self.flow.share(plan)

        def work() -> Iterator[Task]:
            for part in self._in_ranges(curated.runs, shards):
                follows = key("shards", [[run.name, run.decided] for run in part.runs], told, libraries.versions(["tokenizers"]))
                given = {"runs": self.flow.share(part.runs), "plan": shared}
                for first in range(part.first, part.stop, each):
                    stop = min(first + each, part.stop)
                    yield Task(key(follows, first, stop), {"first": first, "stop": stop}, given, reads)

        there = dict(self.output.join(SHARDS).files())
        cpus = self.flow.cpus_each(shards)

        def whole(record: dict[str, Any]) -> bool:
            return all(there.get(s["path"].removeprefix(f"{SHARDS}/")) == s["file_bytes"] for s in record["shards"])

        for _, record in self.flow.run("shards", tasks.write_shards, work(), cpus, whole):
            yield record


def pieces_of(flow: Flow, input: str, files: list[InputFile], target: int) -> Iterator[list[FilePart]]:
    """Cuts an input into pieces of about `target` bytes; of files that are read in ranges of lines, the lines before each range
    are counted first."""
    cut = list(pieces.cut((f.part for f in files), target, lambda path: readers.ranged(path or input)))
    unknown = [p[0] for p in cut if p[0].stop is not None and readers.numbered(p[0].path or input) == "line"]
    count = (Task(key("lines", input, part.identity), {"input": input, "part": part}) for part in unknown)
    lines = dict(zip(unknown, (r["lines"] for r in flow.all("lines", tasks.count_lines, count)), strict=True))
    return numbered(cut, lines)


def numbered(cut: list[list[FilePart]], lines: dict[FilePart, int]) -> Iterator[list[FilePart]]:
    """Yields the pieces with the number of the first record of each range, from the lines of those before it in its file."""
    path, first = None, 1
    for piece in cut:
        part = piece[0]
        if part not in lines:
            yield piece
            continue
        if part.path != path:
            path, first = part.path, 1
        yield [replace(part, first=first)]
        first += lines[part]


def listed(flow: Flow, rows: int, names: list[str], output: Location, **also: Any) -> list[str]:
    """Lists so many documents that were left out, in as many files as ranges of hashes; returns their paths."""
    work = by_parts(flow, "listed", reasons.parts(rows), names, output=output.uri, **also)
    made = flow.all("listed", tasks.list_left_out, work, valid=lambda record: output.join(record["listed"]).exists())
    return [record["listed"] for record in made]


class Totals:
    """Sums the shards' counts."""

    def __init__(self, vocab_size: int, dropped: Counter[str], examples: dict[str, list[str]]) -> None:
        self.documents = self.duplicates = self.bytes = self.cut = 0
        self.chunks: list[dict[str, Any]] = []
        self.dropped, self.examples = dropped, examples
        self.counts, self.rearranged = np.zeros(vocab_size, np.int64), Counter[str]()
        self.together = Counter[str](groups=0, documents=0)

    def add(self, shard: dict[str, Any]) -> None:
        self.documents += shard["documents"]
        self.duplicates += shard["duplicates"]
        self.bytes += shard["bytes"]
        self.cut += shard["cut"]
        self.chunks += shard["chunks"]
        self.rearranged.update(shard.get("rearranged", {}))
        self.together.update(shard.get("together", {}))
        self.counts += np.frombuffer(zlib.decompress(base64.b64decode(shard["counts"])), np.int64)

    def log(self, stages: list[Stage], together: Together | None = None) -> None:
        """Logs what was cut and what was dropped, with examples, and how many documents belong together."""
        if together is not None:
            many, alone = self.together["documents"], self.documents - self.together["documents"]
            said = "together: %d documents of %d values of %r follow each other; %d have none"
            log.log(logging.WARNING if alone else logging.INFO, said, many, self.together["groups"], together.column, alone)
        if self.cut:
            log.info("documents longer than a chunk may be (chunk_tokens) are cut at %d places; no token is lost", self.cut)
        told = documents.REASONS | {
            f"{tally.label(i, s)}: {r}": f"{s.named()}: {w}" for i, s in enumerate(stages) for r, w in s.reasons.items()
        }
        for reason, count in sorted(self.dropped.items()):
            log.warning("dropped %d: %s, such as %s", count, told.get(reason, reason), sources.examples(self.examples[reason]))
