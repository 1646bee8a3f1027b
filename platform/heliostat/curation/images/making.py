"""Makes an image dataset: trains the tokenizer, distributes images to shards, and collects the facts for the manifest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from typing import Any, ClassVar

from heliostat.curation import gpus, pieces, recording, segment, tally
from heliostat.curation.comparing import RUNS
from heliostat.curation.engine import RUN_SHARE, Curated, groups
from heliostat.curation.images import encoding, features, pictures, planning, sampling, stream, tasks
from heliostat.curation.images import sources as image_sources
from heliostat.curation.images.encoding import Encoding
from heliostat.curation.images.fetching import REASONS, Fetching
from heliostat.curation.images.latents import EMPTY, Latents
from heliostat.curation.images.stream import DealtImages
from heliostat.curation.images.tasks import END, ImageSource, Shards
from heliostat.curation.making import Making, WrittenShards, spread
from heliostat.curation.pieces import FilePart
from heliostat.curation.predicting import Prediction
from heliostat.curation.prepare import InputFile
from heliostat.curation.segment import SpilledRun
from heliostat.curation.stage import Stage
from heliostat.curation.text.making import identities
from heliostat.curation.web import lists
from heliostat.data import manifest, versions
from heliostat.data.manifest import FILES
from heliostat.data.row_groups import ShardCollector
from heliostat.storage.locations import Location
from heliostat.tasks import libraries
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Task
from heliostat.tasks.work import key

log = logging.getLogger(__name__)

SHARD_SHARE = 4  # memory of a shard's task / bytes of the shard: images, sorted images, and the file


@dataclass
class ImageMaking(Making):
    """Makes the dataset of one pipeline; the fields are the pipeline's keys."""

    meanings: ClassVar = pictures.REASONS | REASONS
    what_read: ClassVar = True

    source: ImageSource
    last: Stage | None
    """Stage that finds duplicates, after all other stages. The dataset's reports list the images that this stage drops together
    with the images that reading drops."""
    shard_images: int
    chunk_images: int
    channels: int
    buckets: bool
    tokenizer: int | None
    """Size of the tokenizer's vocabulary; None without a tokenizer."""
    latents: Latents | None
    captions: tuple[str, ...]
    """Columns with further captions, which the shards contain."""

    @property
    def can_repeat(self) -> bool:
        return self.source.fetching is None

    @property
    def identity(self) -> list[object]:
        read = self.source
        fetched = [read.fetching.config.identity()] if read.fetching else []
        return [read.input, asdict(read.columns), asdict(read.rules), asdict(read.limits), *fetched]

    @property
    def columns(self) -> list[str]:
        return list(self.source.columns.others)

    @property
    def all_stages(self) -> list[Stage]:
        return [*self.stages, *([self.last] if self.last else [])]

    @property
    def as_read(self) -> list[str]:
        return [tally.label(len(self.stages), self.last)] if self.last else []

    def write(self, curated: Curated) -> WrittenShards:
        counts, labels = self._counted(curated.runs)
        if not counts:
            return WrittenShards(manifest.SCHEMA.empty_table(), {})
        folders = [self.output, *(self.output.join(bucket) for bucket in counts if self.buckets)]
        facts: dict[str, Any] = {"documents": sum(counts.values()), "channels": self.channels,
                                 "content": "latents" if self.latents and self.latents.autoencoder else "images"}  # fmt: skip
        if self.latents:
            facts |= self._empty_caption(self.latents, folders)
        shards, images, ends = ShardCollector(), 0, list[str]()
        places = self._places(curated, counts)
        dealt = self._dealt(curated, places)
        facts |= features.described(dealt.features) | (encoding.stated(dealt.errors) if self.latents else {})
        for shard in self._shards(curated, places, dealt.runs):
            images += shard["images"]
            ends += shard["ends"]
            if shard["images"]:
                shards.add(shard)
        sizes: dict[str, Any] = {bucket: {"size": [int(n) for n in bucket.split("x")]} for bucket in counts}
        facts |= {"parts": sizes} if self.buckets else next(iter(sizes.values()))
        if self.tokenizer:
            facts_of_tokens = self._tokenizer(curated.runs, self.tokenizer)
            facts |= {**facts_of_tokens, "files": {**facts.get("files", {}), **facts_of_tokens["files"]}}
        if 0 < len(labels) <= tasks.CLASSES:
            facts["classes"] = labels
        part = {"documents": images, "kept": images, "bytes": curated.bytes, "kept_bytes": curated.bytes}
        return WrittenShards(shards.rows(), facts, part, ends)

    def pieces(self, inputs: list[InputFile]) -> Iterator[list[FilePart]]:
        self.flow.work.begin(pieces.size(sum(f.bytes for f in inputs)))
        if self.latents:
            gpus.require(self.flow, "latents.gpus", self.latents.gpus)
        yield from ([part] for part in self._parts(inputs))

    def _parts(self, inputs: list[InputFile]) -> Iterator[FilePart]:
        read, sizes = self.source, {f.path: f.bytes for f in inputs}
        if read.fetching:
            return self._fetched(inputs, read.fetching)
        if self.sample is None:
            return planning.parts(self.flow, read.input, inputs, read.columns, read.limits.file)
        tasks_of_all = image_sources.tasks(read.input, inputs, read.columns, read.limits.file)
        return (planning.described(task, sizes) for task in sampling.sampled(tasks_of_all, inputs, self.sample))

    def _fetched(self, inputs: list[InputFile], fetching: Fetching) -> Iterator[FilePart]:
        read = self.source
        inputs = sampling.of_lists(inputs, self.sample) if self.sample else inputs
        wanted = [c for c in (read.columns.caption, read.columns.label, *read.columns.others) if c]
        planned = lists.plan(self.flow, read.input, inputs, fetching.config.column, wanted, read.limits.file,
                             self.memory_limit // RUN_SHARE)  # fmt: skip
        chosen = sampling.of_urls(planned, self.sample) if self.sample else planned
        return (planning.described(task, {}, also) for task, also in chosen)

    def refine(self, prediction: Prediction, curated: Curated) -> list[str]:
        """Corrects the seconds for reading lists of URLs: the sample reads complete lists, but fetches only some of their
        URLs."""
        for counts in (self.flow.seconds, self.flow.walls) if self.source.fetching else ():
            counts["lists"] *= prediction.sample.records[sampling.URLS]
        return []

    def _counted(self, runs: list[SpilledRun]) -> tuple[dict[str, int], list[str]]:
        """Counts the images of each bucket, and lists the labels of all images. Stops listing once there are more than
        `images.tasks.CLASSES` labels, the maximum of a manifest."""
        counting = (Task(key("count", [[run.name, run.decided] for run in some]), {"runs": some}) for some in groups(runs, RUNS))
        work = CountedTasks(counting, -(-len(runs) // RUNS))
        counts, labels = Counter[str](), set[str]()
        for _, record in self.flow.run("count", tasks.count, work):
            counts.update(record["buckets"])
            if len(labels) <= tasks.CLASSES:
                labels.update(record["labels"])
        return dict(sorted(counts.items())), sorted(labels)

    def _empty_caption(self, latents: Latents, folders: list[Location]) -> dict[str, Any]:
        meta: dict[str, Any] = {"models": latents.models(), **latents.stored_type()}
        if latents.texts:
            on_cpu = replace(self.encoding(latents), latents=latents.model_copy(update={"gpus": 0.0}))
            work = iter([Task(key("empty", latents.identity()), {"encoding": on_cpu})])
            (record,) = self.flow.all("empty-caption", tasks.encode_nothing, work)
            data = self.flow.work.spill.join(record["name"]).read()
            (path,) = {versions.store(folder, f"{FILES}/empty_caption-", data, ".bin") for folder in folders}
            meta |= {"files": {EMPTY: path}}
            meta |= {"text": record["shape"]} if "shape" in record else {"texts": record["texts"]}
        return meta

    def _places(self, curated: Curated, counts: dict[str, int]) -> Shards:
        """Computes the number of shards of each bucket. Warns if a shard needs more memory than the pipeline allows."""
        numbers = {bucket: max(1, round(count / self.shard_images)) for bucket, count in counts.items()}
        total = sum(numbers.values())
        if curated.bytes * SHARD_SHARE > self.memory_limit * total:
            log.warning("shard_images: a shard of %d bytes needs about %d bytes of memory, more than memory_limit (%d). "
                        "Lower shard_images, or raise memory_limit",
                        curated.bytes // total, curated.bytes * SHARD_SHARE // total, self.memory_limit)  # fmt: skip
        firsts = accumulate(numbers.values(), initial=0)
        return {bucket: (first, numbers[bucket]) for bucket, first in zip(numbers, firsts, strict=False)}

    def _dealt(self, curated: Curated, shards: Shards) -> DealtImages:
        """Distributes the kept images to the shards of their buckets, and encodes them."""
        latents = self.latents
        encoding = self.encoding(latents) if latents else None
        follows: Any = latents.identity() if latents else None
        if self.captions and latents:
            follows = [follows, self.captions]
        uses = libraries.versions(("diffusers", *libraries.MODELS) if latents else ())
        arguments = {"shards": shards, "encoding": encoding}
        tasks_of_runs = (Task(key("deal", run.name, run.decided, shards, follows, uses), {"run": run, **arguments},
                              bytes=run.bytes) for run in curated.runs)  # fmt: skip
        dealing = CountedTasks(tasks_of_runs, len(curated.runs))
        if latents is None or encoding is None:
            each = self.flow.taken(stream.KIND, tasks.deal, dealing, stream.dealt)
        else:
            plan = stream.EncodingStream(latents.workers, latents.gpus, encoding, shards)
            each = gpus.taken(self.flow, plan, "latents.gpus", tasks.deal, dealing, stream.dealt)
        runs, facts, errors = (list(chain.from_iterable(of_each)) for of_each in zip(*each, strict=True))
        return DealtImages(runs, facts, errors)

    def encoding(self, latents: Latents) -> Encoding:
        """Describes how the tasks encode images."""
        return Encoding(latents, tuple(latents.shipments()), self.captions)

    def _shards(self, curated: Curated, shards: Shards, dealt: list[SpilledRun]) -> Iterator[dict[str, Any]]:
        """Writes the shards of all buckets."""
        total = sum(number for _, number in shards.values())
        each = curated.bytes // total
        ranges = self.ranges(dealt, total, lambda first, stop: (first, stop))
        plan = {"chunk_images": self.chunk_images, "output": self.output.uri, "explained": self.explained}
        plan |= recording.arguments(self.every)
        stored = dict.fromkeys([*self.source.stored, *(name for stage in self.stages for name in stage.stored()), *self.captions])
        plan |= {"stored": tuple(stored)} if stored else {}
        places = [(bucket, i) for bucket, (_, number) in shards.items() for i in range(number)]

        def work() -> Iterator[Task]:
            for part in spread(ranges):
                names = [run.name for run in part.runs]
                shared, base = {"names": self.flow.share(names)}, key("shards", tasks.VERSION, names, plan)
                for number in spread(range(part.first, part.stop)):
                    prefix = tasks.folder_of(*places[number], self.buckets)
                    yield Task(key(base, number), {"number": number, "prefix": prefix, **plan}, shared, each)

        return self.shards(tasks.write_shard, work())

    def _tokenizer(self, runs: list[SpilledRun], vocab_size: int) -> dict[str, Any]:
        train = Task(
            key("captions", identities(runs), vocab_size, libraries.versions(["tokenizers"])),
            {"vocab_size": vocab_size},
            {"runs": self.flow.share(runs)},
        )
        (record,) = self.flow.all("tokenizer", tasks.train, iter([train]))
        definition = segment.load(self.flow.work.spill, record["definition"])
        folders = [self.output, *(self.output.join(f"{w}x{h}") for w, h in self.source.rules.sizes if self.buckets)]
        return self.tokenizer_facts(definition, END, folders)
