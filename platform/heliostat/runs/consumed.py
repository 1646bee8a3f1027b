"""Computes the content of `data.json`: the data that a run has trained on. This is the run's segments, and the samples taken from
each source, by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NotRequired

import numpy as np
from typing_extensions import TypedDict

from heliostat.data import ancestry, coverage
from heliostat.data.ancestry import MADE_FROM, SourceDataset
from heliostat.data.conversations import row_tokens
from heliostat.data.coverage import Segment
from heliostat.data.dataset import DataPlan, Dataset, open_dataset
from heliostat.data.manifest import Manifest
from heliostat.data.manifest_table import HUB
from heliostat.runs import segments
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Whole, open_


@open_
class ConsumedPlace(TypedDict):
    dataset: str
    shard: str
    row_group: Whole
    row: Whole


@open_
class Replaced(ConsumedPlace):
    """Describes a bad sample and its replacement: a line of the lists in the folder `quarantine` of the run."""

    step: Whole
    counted_from: NotRequired[Whole]
    reason: str
    replaced_by: ConsumedPlace


class Forgotten(TypedDict):
    """Describes an earlier version of a dataset. heliostat made the present version by removing the documents `ids` from this
    earlier version."""

    digest: str
    ids: list[str]


class ConsumedSource(TypedDict):
    """Describes the samples that a segment took from one source.

    `samples`: number of samples trained on. `range`: positions in the source's stream of samples, which repeats the source once
    per epoch. The limits of the range are exact to one sample per virtual rank.
    """

    uri: str
    digest: str
    name: str
    kind: str
    tokenizer: str | None
    weights: list[tuple[int, float]]  # (first step, weight)
    samples: int
    tokens: int
    range: tuple[int, int]
    left_out: int
    epochs: float
    held_out: int
    shards: dict[str, int]  # numbers of seen shards and of all shards (seen, total)
    ranges: list[tuple[str, str]]  # ranges of shards: (first, last)
    ranges_left_out: int
    forgotten: NotRequired[list[Forgotten]]
    hub: NotRequired[dict[str, str]]  # the dataset's inputs from the Hugging Face Hub, each with its commit
    made_from: NotRequired[list[SourceDataset]]
    inputs: NotRequired[list[str]]  # the folders of `made_from`, and the input of the first pipeline


class Taken(TypedDict):
    """Describes a segment of a run (steps with the same data plan), and the number of samples from each source.

    `plan`: from `DataPlan.dump`.
    """

    first: int
    end: int
    digest: str
    plan: dict[str, object]
    sources: list[ConsumedSource]


class Consumed(TypedDict):
    """Describes the data that a run has trained on: the content of `data.json`."""

    steps: int
    segments: list[Taken]
    replaced: list[Replaced]
    replaced_count: int


REPLACED = Format(Replaced, "list of replaced samples")
LISTED = 200  # maximum number of shard ranges, and of replaced samples, in the record


def record(run: Location, steps: int) -> Consumed:
    """Computes the data that a run has trained on, from its folder and the manifests of its datasets."""
    lists = [run.join(run_folder.QUARANTINE, name) for name, _ in run.join(run_folder.QUARANTINE).files()]
    lines = (_from_1(bad) for place in lists for bad in REPLACED.read_lines(place))
    replaced = list({json.dumps(bad, sort_keys=True): bad for bad in lines}.values())  # lists can overlap, like receipts
    return {
        "steps": steps,
        "segments": [_segment(s) for s in coverage.cut(segments.read(run), steps)],
        "replaced": replaced[:LISTED],
        "replaced_count": len(replaced),
    }


def _from_1(bad: Replaced) -> Replaced:
    """Converts the step of a replaced sample from a list that counts steps from 0, as older lists do, to a step that counts from
    1."""
    return {**bad, "step": bad["step"] + 1 - bad.get("counted_from", 0), "counted_from": 1}


def parse(raw: Consumed) -> list[Segment]:
    """Parses the segments of a run's `data.json`."""
    return [Segment(s["first"], s["end"], DataPlan.parse(s["plan"], "data.json")) for s in raw["segments"]]


def _segment(segment: Segment) -> Taken:
    data = open_dataset(segment.plan)
    counts = coverage.segment_counts(segment, data.sources)
    begin, end = data.order.consumed(segment.first), data.order.consumed(segment.end)
    left_out = coverage.left_out(segment, data.sources)
    return {
        "first": segment.first,
        "end": segment.end,
        "digest": segment.plan.digest,
        "plan": segment.plan.dump(),
        "sources": [_source(data, i, counts[i], left_out[i], int(begin[i]), int(end[i])) for i in range(len(counts))],
    }


def _source(data: Dataset, number: int, counts: np.ndarray, left_out: int, begin: int, end: int) -> ConsumedSource:
    manifest, split = data.sources[number], data.order.splits[number]
    seen = coverage.shards(manifest, counts)
    ranges = list(coverage.ranges(manifest, seen))
    samples = int(counts.sum())
    source: ConsumedSource = {
        "uri": data.plan.uris[number],
        "digest": manifest.digest,
        "name": manifest.meta.get("name", manifest.location.name),
        "kind": manifest.kind,
        "tokenizer": manifest.meta.get("tokenizer"),
        "weights": [(step, weights[number]) for step, weights in data.plan.mix],
        "samples": samples,
        "tokens": round(samples * (data.plan.sequence_length or row_tokens(manifest))),
        "range": (begin, end),
        "left_out": left_out,
        "epochs": samples / int(data.order.epoch_samples[number]),
        "held_out": int(split.held.sum()),
        "shards": {"seen": len(seen), "total": len(manifest.paths)},
        "ranges": ranges[:LISTED],
        "ranges_left_out": max(0, len(ranges) - LISTED),
    }
    if "forgotten" in manifest.meta:
        source["forgotten"] = manifest.meta["forgotten"]
    if HUB in manifest.meta:
        source["hub"] = manifest.meta[HUB]
    if MADE_FROM in manifest.meta:
        source["made_from"] = manifest.meta[MADE_FROM]
    if inputs := ancestry.inputs_of(manifest):
        source["inputs"] = inputs
    return source


def of_digest(raw: Consumed, digest: str, before: int | None = None) -> int:
    """Counts the samples that a run took from the datasets whose digest begins with `digest`.

    `raw`: the run's `data.json`. `before`: counts only this number of steps.
    """
    return sum(int(counts.sum()) for _, manifest, counts in _taken(raw, before, lambda s: s["digest"].startswith(digest)))


def of_shard(raw: Consumed, shard: str, before: int | None = None) -> int:
    """Counts the samples that a run took from one shard. A replaced sample counts for the shard of the sample that replaced it.

    `raw`: the run's `data.json`. `shard`: a complete path or URI, or its end, such as `part-00017.parquet`. `before`:
    counts only this number of steps.
    """
    total = 0
    for uri, manifest, counts in _taken(raw, before, lambda s: True):
        for path, samples in coverage.shards(manifest, counts).items():
            if same(shard, uri, path):
                total += samples
    for bad in raw["replaced"]:
        if before is None or bad["step"] <= before:  # a list counts steps from 1
            instead = bad["replaced_by"]
            total += same(shard, instead["dataset"], instead["shard"]) - same(shard, bad["dataset"], bad["shard"])
    return total


def same(wanted: str, uri: str, path: str) -> bool:
    """Checks whether a dataset's shard is the `wanted` shard. `wanted` is a path, a URI, or the end of a path or URI.

    `wanted` may also be a shard's folder, such as `shards/00017`, because the name of the file in the folder depends on the
    file's content.
    """
    whole = Location(uri).join(path).path
    named = (whole, whole.rpartition("/")[0])
    if "://" in wanted or wanted.startswith("/"):
        return Location(wanted).path in named
    return any(f"/{place}".endswith(f"/{wanted}") for place in named)


def _taken(
    raw: Consumed, before: int | None, wanted: Callable[[ConsumedSource], bool]
) -> Iterator[tuple[str, Manifest, np.ndarray]]:
    """Yields (uri, manifest, samples per row group) of every wanted source of every segment. If `before` is given, counts only
    this number of steps."""
    for segment, recorded in zip(parse(raw), raw["segments"], strict=True):
        end = segment.end if before is None else min(segment.end, before)
        if end <= segment.first or not any(wanted(s) for s in recorded["sources"]):
            continue
        sources = open_dataset(segment.plan).sources
        counts = coverage.segment_counts(Segment(segment.first, end, segment.plan), sources)
        for source, manifest, taken in zip(recorded["sources"], sources, counts, strict=True):
            if wanted(source):
                yield source["uri"], manifest, taken
