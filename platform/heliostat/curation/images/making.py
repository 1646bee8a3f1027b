"""Makes an image dataset: reads and curates, trains the tokenizer, deals images to shards, and sums it all for the manifest."""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from heliostat.curation import pieces, segment, tally
from heliostat.curation.engine import RUN_SHARE, Curated, StageEngine
from heliostat.curation.explaining import explain
from heliostat.curation.images import pictures, tasks
from heliostat.curation.images import sources as image_sources
from heliostat.curation.images.fetching import REASONS
from heliostat.curation.images.latents import EMPTY, Latents
from heliostat.curation.images.tasks import END, ImageSource, Shards
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import EXAMPLES, SpilledRun
from heliostat.curation.stage import Stage
from heliostat.curation.text import sources, tokens
from heliostat.curation.text.making import listed
from heliostat.curation.web import lists
from heliostat.data import versions
from heliostat.data.manifest import FILES
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, merging
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

log = logging.getLogger(__name__)

SHARD_SHARE = 4  # a shard's task holds its images, sorted, and its file


@dataclass
class ImageMaking:
    """Makes the dataset of one pipeline; the fields are its keys."""

    flow: Flow
    source: ImageSource
    output: Location
    stages: list[Stage]
    last: Stage | None
    """Finds duplicates behind the stages; what it leaves out is told as reading's is."""
    memory_limit: int
    shard_images: int
    chunk_images: int
    channels: int
    buckets: bool
    tokenizer: int | None
    """The size of its vocabulary, None without one."""
    latents: Latents | None
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds of each stage, afterwards."""
    counted: tally.Tally = field(default_factory=dict)
    """What the stages did, afterwards."""

    @property
    def explained(self) -> bool:
        """Tells whether the dataset says what became of each image."""
        return bool(self.stages)

    @property
    def all_stages(self) -> list[Stage]:
        return [*self.stages, *([self.last] if self.last else [])]

    def run(self, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Writes everything but the manifest, and returns its rows and metadata."""
        read = self.source
        identity = [read.input, asdict(read.columns), asdict(read.rules), asdict(read.limits)]
        identity += [read.fetching.config.identity()] if read.fetching else []
        engine = StageEngine(self.flow, read, identity, self.memory_limit)
        curated = engine.curate(self._pieces(inputs), self.all_stages, self.explained)
        counts, labels = self._counted(curated.runs)
        dropped = self._dropped(curated)
        meta = {"kind": "rows", "dropped": dropped, "documents": sum(counts.values()), "channels": self.channels}
        if rows := sum(number for reason, number in dropped.items() if ": " not in reason):  # not of stages
            meta["listed"] = self._listed(curated, rows)
        if not counts:
            return [], meta
        told: dict[str, Any] = {"content": "latents" if self.latents else "images"}
        folders = [self.output, *(self.output.join(bucket) for bucket in counts if self.buckets)]
        if self.latents:
            told |= self._empty_caption(self.latents, folders)
        written = list(self._shards(curated, counts))
        sizes: dict[str, Any] = {bucket: {"size": [int(n) for n in bucket.split("x")]} for bucket in counts}
        told |= {"parts": sizes} if self.buckets else next(iter(sizes.values()))
        if self.tokenizer:
            made = self._tokenizer(curated.runs, self.tokenizer)
            told |= {**made, "files": {**told.get("files", {}), **made["files"]}}
        if 0 < len(labels) <= tasks.CLASSES:
            told["classes"] = labels
        if self.explained:
            told |= self._explained(curated, written)
        return [chunk for shard in written for chunk in shard["chunks"]], {**meta, **told}

    def _pieces(self, inputs: list[InputFile]) -> Iterator[list[FilePart]]:
        """Spills the read tasks one by one, so that the driver holds none of what metadata files list."""
        self.flow.work.begin(pieces.size(sum(f.bytes for f in inputs)))
        sizes = {f.path: f.bytes for f in inputs}
        for task in self._tasks(inputs):
            paths = [part["path"] for part in task.get("parts", [])] or [e["path"] for e in task.get("entries", [])]
            yield [FilePart(segment.store(self.flow.work.spill, task), sum(sizes.get(path, 0) for path in paths), 0)]

    def _tasks(self, inputs: list[InputFile]) -> Iterator[dict[str, Any]]:
        read = self.source
        if read.fetching is None:
            return image_sources.tasks(read.input, inputs, read.columns, read.limits.file)
        wanted = [c for c in (read.columns.caption, read.columns.label, *read.columns.others) if c]
        return lists.plan(self.flow, read.input, inputs, read.fetching.config.column, wanted, read.limits.file)

    def _counted(self, runs: list[SpilledRun]) -> tuple[dict[str, int], list[str]]:
        """Counts the images of each bucket, and lists the labels, as far as a manifest would."""
        work = (Task(key("count", run.name, run.decided), {"run": run}) for run in runs)
        counts, labels = Counter[str](), set[str]()
        for _, record in self.flow.run("count", tasks.count, work):
            counts.update(record["buckets"])
            if len(labels) <= tasks.CLASSES:
                labels.update(record["labels"])
        return dict(sorted(counts.items())), sorted(labels)

    def _dropped(self, curated: Curated) -> dict[str, int]:
        """Counts what was left out by reason, and logs each with examples."""
        found, examples = Counter[str](), dict[str, list[str]]()
        for reason, number in curated.reasons.items():
            plain = reason.removeprefix(f"{self._last}: ")
            found[plain] += number
            examples[plain] = heapq.nsmallest(EXAMPLES, [*examples.get(plain, []), *curated.examples[reason]])
        self._log(found, examples)
        return dict(sorted(found.items()))

    def _log(self, found: Counter[str], examples: dict[str, list[str]]) -> None:
        told = (
            pictures.REASONS
            | REASONS
            | {f"{tally.label(i, s)}: {r}": f"{s.named()}: {w}" for i, s in enumerate(self.stages) for r, w in s.reasons.items()}
        )
        for reason in sorted(found):
            log.warning("dropped %d: %s, such as %s", found[reason], told.get(reason, reason), sources.examples(examples[reason]))

    @property
    def _last(self) -> str:
        return tally.label(len(self.stages), self.last) if self.last else ""

    def _listed(self, curated: Curated, rows: int) -> list[str]:
        return listed(self.flow, rows, curated.left_out, self.output, also=[self._last] if self.last else [])

    def _empty_caption(self, latents: Latents, folders: list[Location]) -> dict[str, Any]:
        meta: dict[str, Any] = {"models": latents.models()}
        if latents.text_encoder:
            config, follows = latents.model_dump(), latents.identity()
            work = iter([Task(key("empty", follows), {"latents": config, "shipments": latents.shipments()})])
            (record,) = self.flow.all("empty-caption", tasks.encode_nothing, work)
            data = self.flow.work.spill.join(record["name"]).read()
            (path,) = {versions.store(folder, f"{FILES}/empty_caption-", data, ".bin") for folder in folders}
            meta |= {"files": {EMPTY: path}, "text": record["shape"]}
        return meta

    def _shards(self, curated: Curated, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Deals the runs' images to the shards of their buckets, and writes those."""
        numbers = {bucket: max(1, round(count / self.shard_images)) for bucket, count in counts.items()}
        firsts = accumulate(numbers.values(), initial=0)
        shards: Shards = {bucket: (first, numbers[bucket]) for bucket, first in zip(numbers, firsts, strict=False)}
        total = sum(numbers.values())
        if curated.bytes * SHARD_SHARE > self.memory_limit * total:
            log.warning("shard_images: a shard of %d bytes takes about %d of memory, more than memory_limit (%d)",
                        curated.bytes // total, curated.bytes * SHARD_SHARE // total, self.memory_limit)  # fmt: skip
        latents = self.latents.model_dump() if self.latents else None
        follows = self.latents.identity() if self.latents else None
        shipments = self.latents.shipments() if self.latents else []
        given = {"shards": shards, "latents": latents, "shipments": shipments}
        uses = libraries.versions(("diffusers", *libraries.MODELS) if self.latents else ())
        dealing = (Task(key("deal", run.name, run.decided, shards, follows, uses), {"run": run, **given}, bytes=run.bytes)
                   for run in curated.runs)  # fmt: skip
        actors = {"actors": self.latents.workers, "gpus": self.latents.gpus} if self.latents else {}
        dealt = [SpilledRun(*record["dealt"]) for record in self.flow.all("deal", tasks.deal, dealing, **actors)]
        ranges = merging.merged(self.flow, dealt, total, lambda first, stop: (first, stop), self.memory_limit // RUN_SHARE)
        told = {"chunk_images": self.chunk_images, "output": self.output.uri, "explained": self.explained}
        stored = dict.fromkeys(name for stage in self.stages for name in stage.stored())
        told |= {"stored": tuple(stored)} if stored else {}
        places = [(bucket, i) for bucket, (_, number) in shards.items() for i in range(number)]

        def work() -> Iterator[Task]:
            for part in ranges:
                names = [run.name for run in part.runs]
                shared, base = {"names": self.flow.share(names)}, key("shards", names, told)
                for number in range(part.first, part.stop):
                    prefix = tasks.folder_of(*places[number], self.buckets)
                    yield Task(key(base, number), {"number": number, "prefix": prefix, **told}, shared, curated.bytes // total)

        there = dict(self.output.files())
        yield from self.flow.all("shards", tasks.write_shard, work(), valid=lambda r: there.get(r["path"], 0) == r["file_bytes"])

    def _tokenizer(self, runs: list[SpilledRun], vocab_size: int) -> dict[str, Any]:
        follows = [[run.name, run.decided] for run in runs]
        train = Task(
            key("captions", follows, vocab_size, libraries.versions(["tokenizers"])),
            {"vocab_size": vocab_size},
            {"runs": self.flow.share(runs)},
        )
        (record,) = self.flow.all("tokenizer", tasks.train, iter([train]))
        definition = segment.load(self.flow.work.spill, record["definition"])
        folders = [self.output, *(self.output.join(f"{w}x{h}") for w, h in self.source.rules.sizes if self.buckets)]
        (path,) = {versions.store(folder, f"{FILES}/tokenizer-", definition.encode(), ".json") for folder in folders}
        return {
            "files": {"tokenizer.json": path},
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "vocab_size": tokens.load(definition).get_vocab_size(),
            "end_of_document": tokens.end_id(tokens.load(definition), END),
        }

    def _explained(self, curated: Curated, written: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the funnel and what became of each image; returns what the manifest says of them."""
        images = sum(shard["images"] for shard in written)
        part = {"documents": images, "kept": images, "bytes": curated.bytes, "kept_bytes": curated.bytes}
        ends = sorted([*curated.left_out, *(name for shard in written for name in shard["ends"])])
        rows = images + sum(curated.reasons.values())
        columns = list(self.source.columns.others)
        made = explain(
            self.flow, self.all_stages, curated.tallies, part, ends, rows, columns, self.output, pictures.REASONS | REASONS
        )
        self.counted, self.seconds = made.total, made.seconds
        return made.meta
