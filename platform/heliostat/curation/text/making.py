"""Makes a text dataset: trains the tokenizer, writes the shards, and collects the entries of the manifest."""

from __future__ import annotations

import base64
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from math import ceil
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from heliostat.curation import pieces, readers, recording, segment
from heliostat.curation.engine import RUN_SHARE, Curated, filled, groups
from heliostat.curation.making import Making, WrittenShards, spread
from heliostat.curation.pieces import FilePart
from heliostat.curation.predicting import SHARD, TOKENIZER, Prediction, Rate
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import SpilledRun
from heliostat.curation.text import documents, gathering, infilling, packing, rates, tasks, token_counts, tokens
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.infilling import FillInTheMiddle
from heliostat.curation.text.tasks import TextSharding, TextSource
from heliostat.data.infilling import COUNTS, FACT, OWN, find
from heliostat.data.row_groups import ShardCollector
from heliostat.errors import ConfigError
from heliostat.tasks import libraries, merging, spill
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import ShardRange
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.work import key

log = logging.getLogger(__name__)

SAMPLES = 64  # maximum files with the tokenizer's training text
SAMPLED_RUNS = 256  # maximum runs from which a task selects training text: about half a minute in an object store
SPARE = 1.5  # bytes of the documents that tasks select / `train_bytes`
SHARD_SHARE = 6  # a shard's task has its texts, its tokens, and its file in memory
ALONE = 4096  # maximum number of small shards with a task each
TASK_BYTES = 128 << 20  # bytes of the small shards that a task writes: about a minute


@dataclass
class Reading(Making):
    """Reads texts, and trains a tokenizer on the texts that the pipeline's stages keep."""

    meanings: ClassVar = documents.REASONS

    source: TextSource
    tokenizer: dict[str, Any]
    given_tokenizer: str | None
    shard_bytes: int

    @property
    def columns(self) -> list[str]:
        return list(self.source.rules.columns)

    def pieces(self, inputs: list[InputFile]) -> Iterable[list[FilePart]]:
        if self.sample is not None:
            return self.sample.pieces()
        target = self.flow.work.begin(pieces.size(sum(f.bytes for f in inputs)))
        return pieces_of(self.flow, self.source.input, inputs, target, self.source.rules.max_file_bytes)

    def count(self, curated: Curated) -> int:
        """Returns the number of shards."""
        return max(1, round(curated.bytes / self.shard_bytes))

    def single_shards(self, curated: Curated, write: TaskFunction, plan: Any, *follows: object) -> Iterator[dict[str, Any]]:
        """Writes each shard in a task of its own, and yields the tasks' records. `plan`: has the number of shards (`shards`).
        `follows`: the beginning of the tasks' keys."""
        each, shared = curated.bytes // plan.shards, self.flow.share(plan)

        def work() -> Iterator[Task]:
            for part in self.ranges(curated.runs, plan.shards):
                before = key(*follows, identities(part.runs), vars(plan))
                shared_run = {"runs": self.flow.share(part.runs), "plan": shared}
                for number in range(part.first, part.stop):
                    yield Task(key(before, number), {"number": number}, shared_run, each)

        return self.shards(write, work())

    def definition(self, curated: Curated, markers: tuple[str, ...] = ()) -> Callable[[], str]:
        """Returns a function that returns the definition (JSON) of the pipeline's existing tokenizer, or starts to train a
        tokenizer, for whose end the function waits. The training text is a sample: the documents with the lowest hashes, up to
        `train_bytes`. `markers`: additional special tokens."""
        if (existing := self.given_tokenizer) is not None:
            return lambda: existing
        config = self.tokenizer | ({"markers": markers} if markers else {})
        arguments = {**self._training_text(curated.runs), "config": config}
        train = Task(key("tokenizer", arguments, libraries.versions(["tokenizers"])), arguments)
        training = self.flow.ahead("tokenizer", tasks.train_on, iter([train]))
        return lambda: segment.load(self.flow.work.spill, training()[0]["definition"])

    def _training_text(self, runs: list[SpilledRun]) -> dict[str, Any]:
        """Copies the documents with the lowest hashes to a few temporary files. Returns the arguments of the task that trains the
        tokenizer: the files, the end of the range of keys that they cover, and the bytes of their documents.

        Hashes are random, so a share of the keys has about the same share of the bytes. A task reads only this share of each of
        its runs. If the documents of this share have fewer bytes than `train_bytes`, doubles the share.
        """
        wanted, bytes = self.tokenizer["train_bytes"], max(1, sum(run.bytes for run in runs))
        size = min(SAMPLED_RUNS, max(1, -(-len(runs) // SAMPLES)))
        prefixes = min(tasks.PREFIXES, ceil(SPARE * wanted / bytes * tasks.PREFIXES))
        while True:
            high = prefixes << tasks.PREFIX_SHIFT
            work = (Task(key("sample", identities(part), high), {"runs": part, "high": high}) for part in groups(runs, size))
            records = self.flow.all("sample", tasks.lowest, work)
            selected = sum(record["bytes"] for record in records)
            if selected >= wanted or prefixes == tasks.PREFIXES:
                samples = [name for record in records for name in record["sample"]]
                return {"samples": self._merged_samples(samples), "high": high, "bytes": selected}
            prefixes = min(tasks.PREFIXES, 2 * prefixes)

    def _merged_samples(self, names: list[str]) -> list[str]:
        """Merges the files with training text until there are at most SAMPLES, because one task reads all of them. Stops
        earlier if the files are too large to merge."""
        before = len(names) + 1
        while SAMPLES < len(names) < before:
            before = len(names)
            runs, bounds = [SpilledRun(name, 0, spill.size_of(name) or 0) for name in names], {"low": 0, "high": spill.ALL}
            more = {**bounds, "run_bytes": self.memory_limit // RUN_SHARE}
            work = (Task(key("merge", identities(part), more), {"runs": part, **more}) for part in groups(runs, SAMPLES))
            records = self.flow.all("sample-merge", merging.merge_spills, work)
            names = [name for record in records for name, *_ in record["runs"]]
        return names

    def regrouped(self, curated: Curated, together: Together, problem: str, fix: str) -> tuple[int, list[str]]:
        """Replaces the temporary files of kept documents with files in which related documents are next to each other. Drops
        exact duplicates. Returns their number, and the names of the temporary files that list them.

        Raises ConfigError if a group is too large; `problem` and `fix` are the beginning and the end of the message.
        """
        parts = max(1, -(-curated.bytes * RUN_SHARE // self.memory_limit))
        more = {"by": together.model_dump(), "explained": self.explained, **recording.arguments(self.every)}
        records = self.flow.all("regroup", gathering.regroup, self._ranged(curated.runs, parts, **more))
        curated.runs = [SpilledRun(*run) for record in records for run in record["runs"]]
        self._check_largest(curated.runs, together.column, parts, problem, fix)
        return sum(record["duplicates"] for record in records), [name for record in records for name in record["ends"]]

    def _ranged(self, runs: list[SpilledRun], parts: int, **more: object) -> Iterator[Task]:
        """Yields one task for each of `parts` equal ranges of hashes. Each task reads its own range from all temporary files of
        documents."""
        for one in self.ranges(runs, parts):
            follows, shared = key(identities(one.runs), more), {"runs": self.flow.share(one.runs)}
            for part in range(one.first, one.stop):
                low, high = tasks.bounds(part, parts)
                yield Task(key(follows, low, high), {"low": low, "high": high, **more}, shared, int(one.part * len(one.runs)))

    def _check_largest(self, runs: list[SpilledRun], column: str, parts: int, problem: str, fix: str) -> None:
        """Raises ConfigError if a group of related documents, which are all in one shard, is too large for the memory of the
        shard's task."""
        work = self._ranged(runs, parts, column=column)
        largest = max(self.flow.all("largest", gathering.largest, work), key=lambda record: record["bytes"])
        needs = largest["bytes"] * SHARD_SHARE
        if needs > self.memory_limit:
            raise ConfigError(
                f"{problem}: the documents of {largest['value']!r} have "
                f"{largest['bytes']:,} bytes in one shard. The shard's task needs {SHARD_SHARE} times as much memory, "
                f"more than memory_limit ({self.memory_limit:,}). Set memory_limit to {needs:,}, {fix}"
            )


@dataclass
class TextMaking(Reading):
    """Makes the dataset of one pipeline; the fields are the pipeline's keys."""

    kind: ClassVar = "tokens"

    chunk_tokens: int
    infill: FillInTheMiddle | None = None
    together: Together | None = None

    @property
    def identity(self) -> list[object]:
        return [self.source.input, vars(self.source.rules)]

    def write(self, curated: Curated) -> WrittenShards:
        trained, came, duplicates, ends = self.definition(curated, OWN if self.infill else ()), curated.bytes, 0, list[str]()
        if self.together is not None:  # grouping drops exact duplicates
            fix = "use a column with smaller groups, or remove this value from the documents"
            problem = f"together.column: {self.together.column!r}"
            duplicates, ends = self.regrouped(curated, self.together, problem, fix)
        shards = self.count(curated)
        ranges = self.ranges(curated.runs, shards)
        definition = trained()
        infill = self._infill(tokens.load(definition))
        definition = infilling.marking(definition, infill["names"]) if infill else definition
        facts = self.tokenizer_facts(definition, self.tokenizer["end_of_document"])
        totals = Totals(facts["vocab_size"])
        totals.duplicates = duplicates
        for record in self._shards(curated, shards, ranges, definition, facts["end_of_document"], infill):
            ends += record["ends"]
            for shard in record["shards"]:
                totals.add(shard)
        self._log(totals)
        facts |= {
            "documents": totals.documents,
            "duplicates": totals.duplicates,
            **({"cuts": totals.cut} if totals.cut else {}),
            **({FACT: infill, COUNTS: dict(totals.rearranged)} if infill else {}),
            **({"together": {**self.together.model_dump(), **totals.together}} if self.together else {}),
            "bytes": totals.bytes,
        }
        counts = totals.counts + token_counts.summed(self.flow, sorted(totals.files), facts["vocab_size"])
        if len(rows := totals.shards.rows()):
            facts["unigram_entropy"] = tokens.entropy(counts)
        shard = {"documents": totals.documents + totals.duplicates, "kept": totals.documents, "kept_bytes": totals.bytes,
                 "bytes": came, "dropped": {"duplicate": totals.duplicates} if totals.duplicates else {},
                 "counts": {"tokens": int(counts.sum())}}  # fmt: skip
        return WrittenShards(rows, facts, shard, ends)

    def _infill(self, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """Returns the manifest's entry for fill in the middle: the keys of `fill_in_the_middle`, and the markers' names and ids.
        None without `fill_in_the_middle`."""
        if self.infill is None:
            return None
        names = infilling.names(tokenizer)
        return {**self.infill.model_dump(), "names": list(names), "markers": list(astuple(find(tokenizer, names)))}

    def _log(self, totals: Totals) -> None:
        """Logs the number of grouped documents, and the number of splits of long documents."""
        if self.sample is not None:
            return
        if self.together is not None:
            many, alone = totals.together["documents"], totals.documents - totals.together["documents"]
            message = "together: grouped %d documents by %d values of column %r; %d documents have no value in this column"
            level = logging.WARNING if alone else logging.INFO
            log.log(level, message, many, totals.together["groups"], self.together.column, alone)
        if totals.cut:
            log.info("chunk_tokens: split longer documents at %d places. No token is lost", totals.cut)

    def _shards(self, curated: Curated, shards: int, ranges: list[ShardRange], definition: str, end: int,
                infill: dict[str, Any] | None) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Writes the shards, and yields their records. If there are many small shards, each task writes several."""
        plan = TextSharding(self.output.uri, shards, definition, end, self.chunk_tokens, self.explained, infill,
                            bool(self.together) or None, **recording.arguments(self.every))  # fmt: skip
        described = {name: value for name, value in vars(plan).items() if value is not None}
        each = shards_each(shards, min(TASK_BYTES, self.memory_limit // 4), self.shard_bytes)
        reads, shared = curated.bytes * each // shards, self.flow.share(plan)

        def work() -> Iterator[Task]:
            for part in spread(ranges):
                follows = key("shards", identities(part.runs), described, libraries.versions(["tokenizers"]))
                shared_run = {"runs": self.flow.share(part.runs), "plan": shared}
                for first in spread(range(part.first, part.stop, each)):
                    stop = min(first + each, part.stop)
                    yield Task(key(follows, first, stop), {"first": first, "stop": stop}, shared_run, reads)

        return self.shards(tasks.write_shards, CountedTasks(work(), -(-shards // each)), self.flow.cpus_each(shards))

    @property
    def of_prediction(self) -> dict[str, Any]:
        most = None if self.given_tokenizer is not None else int(self.tokenizer["train_bytes"])
        return {"most_trained": most, "shards_drop_duplicates": True}

    def refine(self, report: Prediction, curated: Curated) -> list[str]:
        """Adds estimates to a dry run's report: the tokens per byte, and the times for merging temporary files and for training
        the tokenizer. Returns notes for the report."""
        report.rate = rate = self._rate(report, curated)
        notes = self._merged(report, curated)
        if rate.high > rate.low * 1.01:
            notes.append(f"tokens: the sample's tokenizer fits the sample better than the final tokenizer will fit the "
                f"input: {rate.low:.4f} tokens per byte of the sample, {rate.high:.4f} on other text. "
                f"For the whole input, heliostat expects {rate.expected:.4f} tokens per byte")  # fmt: skip
        return notes

    def _merged(self, report: Prediction, curated: Curated) -> list[str]:
        """Merges some of the sample's temporary files, to estimate the time of merging for the whole input. Adds this time to the
        seconds in the report. Returns notes for the report."""
        runs, most, left = curated.runs, self.memory_limit // RUN_SHARE, curated.bytes
        factor = report.factors[0]["" if self.together else SHARD]  # shards drop exact duplicates
        whole = left * report.sample.of_bytes * factor
        least = 1 if self.together else pieces.number(report.sample.input_bytes, report.sample.files)
        many, shards = max(least, round(whole / most)), max(1, round(whole / self.shard_bytes))
        times = merging.passes(many, whole, shards, most)
        if not times:
            return []
        if "merge" in self.flow.seconds:
            own = merging.passes(len(runs), left, max(1, round(left / self.shard_bytes)), most)
            more, what = times / max(1, own), "merge"
        else:
            some, what = next(filled(runs, lambda run: run.bytes, 2 * most)), "merging"
            arguments = {"runs": some, "low": 0, "high": spill.ALL, "run_bytes": most}
            self.flow.all(what, merging.merge, iter([Task(key(what, identities(some)), arguments)]))
            more = times * left / max(1, sum(run.bytes for run in some))
        for counts in (self.flow.seconds, self.flow.walls):
            counts["merge"] = counts[what] * more * factor / report.factors[0][""]
        self.flow.forget("merging")
        how = "once" if times == 1 else f"{times} times"
        return [(f"shards: the whole input becomes about {many:,} sorted temporary files for {shards:,} shards, and heliostat "
            f"merges these files {how} first. The time for this merging is estimated from a part of the sample")]  # fmt: skip

    def _rate(self, report: Prediction, curated: Curated) -> Rate:
        """Estimates the tokens per byte of the whole input. With an existing tokenizer, the estimate is the sample's value."""
        shard, config = report.funnel[SHARD], self.tokenizer
        seen = shard["counts"]["tokens"] / shard["kept_bytes"]
        if self.given_tokenizer is not None:
            return Rate(seen, seen, seen)
        task = Task(key("rates", identities(curated.runs), config), {"runs": curated.runs, "config": config})
        (halves,) = self.flow.all("rates", rates.halves, iter([task]))
        self.flow.forget("rates")
        trained = min(config["train_bytes"], shard["kept_bytes"])
        report.training_grows = rates.training_grows(self.flow.seconds[TOKENIZER], trained, halves) if halves["trained"] else 1.0
        whole = shard["kept_bytes"] * report.sample.of_bytes * report.factors[0][""]
        return rates.of_whole(seen, shard["kept_bytes"], halves, config["train_bytes"], whole)


def shards_each(shards: int, task_bytes: int, shard_bytes: int) -> int:
    """Computes the number of shards that a task writes: one for up to ALONE shards, else as many as fit into `task_bytes`. So a
    task with several shards takes no longer than one with a shard of the default size."""
    return min(max(1, task_bytes // shard_bytes), -(-shards // ALONE))


def identities(runs: list[SpilledRun]) -> list[list[object]]:
    """Returns the names of temporary files of documents, and of the files that list their dropped documents. Tasks that read
    these documents use the result as a part of their keys."""
    return [[run.name, run.decided] for run in runs]


def pieces_of(flow: Flow, input: str, files: list[InputFile], target: int, limit: int | None = None) -> list[list[FilePart]]:
    """Splits an input into pieces of about `target` bytes. For files that are split into ranges of lines, first counts the lines
    before each range.

    `limit`: the maximum decompressed bytes of a file. Without a limit, each compressed file is in one piece.
    """

    def ranged(path: str) -> bool:
        return readers.ranged(path or input) or (limit is not None and readers.framed(path or input))

    cut = list(pieces.cut((f.part for f in files), target, ranged))
    if limit is not None:
        cut = list(packing.divided(flow, input, cut, target, limit))
    unknown = [p[0] for p in cut if p[0].stop is not None and readers.numbered(p[0].path or input) == "line" and not p[0].packed]
    count = (Task(key("lines", input, part.identity), {"input": input, "part": part}) for part in unknown)
    counted = flow.all("lines", tasks.count_lines, count, reads=True)
    lines = dict(zip(unknown, (record["lines"] for record in counted), strict=True))
    return list(numbered(pieces.largest_first(cut, target), lines))


def numbered(cut: Iterable[list[FilePart]], lines: dict[FilePart, int]) -> Iterator[list[FilePart]]:
    """Yields the pieces, and sets the number of the first record in each range of lines. `lines`: the number of lines in each
    range."""
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


class Totals:
    """Sums the counts of all shards: documents, duplicates, bytes, and splits. Collects the shards' rows of the manifest, and the
    temporary files with the occurrences of each token."""

    def __init__(self, vocab_size: int) -> None:
        self.documents = self.duplicates = self.bytes = self.cut = 0
        self.shards = ShardCollector()
        self.counts, self.files, self.rearranged = np.zeros(vocab_size, np.int64), list[str](), Counter[str]()
        self.together = Counter[str](groups=0, documents=0)

    def add(self, shard: dict[str, Any]) -> None:
        self.documents += shard["documents"]
        self.duplicates += shard["duplicates"]
        self.bytes += shard["bytes"]
        self.cut += shard["cut"]
        self.shards.add(shard)
        self.rearranged.update(shard.get("rearranged", {}))
        self.together.update(shard.get("together", {}))
        if spill.size_of(shard["counts"]) is None:  # the record of an earlier version has the counts themselves
            self.counts += np.frombuffer(zlib.decompress(base64.b64decode(shard["counts"])), np.int64)
        else:
            self.files.append(shard["counts"])
