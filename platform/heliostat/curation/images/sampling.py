"""Chooses a sample of an image input for a dry run: some of the single image files, and a share of the images in some
archives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from heliostat.curation.images import planning
from heliostat.curation.images.pictures import Raw
from heliostat.curation.images.tasks import ImageSource
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.sampled import OF_RECORDS, PLACES, SampledParts, chosen, evenly
from heliostat.curation.segment import name_of
from heliostat.curation.stage import Dropped

URLS = "urls"  # kind of the parts that are lists of URLs
LISTS, FETCHES = (
    4,
    8,
)  # minimum numbers of chosen lists and of fetching tasks: a task reads a complete list, or URLs of many hosts
Fetched = tuple[dict[str, Any], dict[str, Any]]
"""A fetching task of `lists.plan`."""
RATE = "rate"  # key of a task: the share of its images that the sample takes


@dataclass(frozen=True)
class SampledImages(ImageSource):
    """Reads a sample of an image input: of each task's images, only those with chosen ids."""

    def rate(self, part: FilePart) -> float:
        """Returns the share of a part's images that are in the sample."""
        return planning.task_of(self.spill, part)[RATE]

    def _raw(self, task: dict[str, Any]) -> Iterator[Raw | Dropped]:
        if self.fetching:
            return self.fetching.read(self.spill, task, self.columns, task[RATE])
        return (raw for raw in super()._raw(task) if task[RATE] >= 1 or chosen(raw.id, task[RATE], OF_RECORDS))


def sampled(tasks: Iterable[dict[str, Any]], inputs: list[InputFile], sample: SampledParts) -> Iterator[dict[str, Any]]:
    """Yields the tasks that read the sample. Records the chosen files and archives, with their sizes in bytes, in `sample`.

    The sample has some of the single images, some archives, and a share of the images in each chosen archive. It has at least
    PLACES archives, or all archives if the input has fewer.
    """
    sizes = {f.path: f for f in inputs}
    archives = list[FilePart]()
    for task in tasks:
        if task["kind"] == "files":
            yield from _files(task, sizes, sample)
        elif task["kind"] == "archives":
            archives += [FilePart.of(fields) for fields in task["parts"]]
        else:  # images that a library ships
            whole = [f.part for f in inputs]
            sample.add(task["kind"], whole, whole, False, sample.fraction)
            yield {**task, RATE: sample.fraction}
    if archives:
        rate = min(1.0, max(sample.fraction, PLACES / len(archives)))
        taken = evenly(archives, rate)
        sample.add("archives", archives, taken, False, sample.fraction / rate)
        for part in sorted(taken, key=lambda part: (part.path, part.start)):
            yield {"kind": "archives", "parts": [asdict(part)], RATE: sample.fraction / rate}


def of_lists(inputs: list[InputFile], sample: SampledParts) -> list[InputFile]:
    """Chooses some of the lists of URLs, at least one. Records the chosen lists, and the share of their URLs to fetch, in
    `sample`. The key of this share is URLS."""
    parts = [file.part for file in inputs]
    taken = evenly(parts, max(sample.fraction, min(1.0, LISTS / len(parts)))) or parts[:1]
    share = min(1.0, sample.fraction * sum(part.length for part in parts) / max(1, sum(part.length for part in taken)))
    sample.add(URLS, parts, [replace(part, bytes=max(1, round(part.bytes * share))) for part in taken], False, 1.0)
    sample.records[URLS] = share
    paths = {part.path for part in taken}
    return [file for file in inputs if file.path in paths]


def of_urls(planned: Iterable[Fetched], sample: SampledParts) -> Iterator[Fetched]:
    """Chooses some of the tasks that fetch the URLs of the chosen lists, and sets the share of URLs that each of them fetches."""
    every = sorted(planned, key=lambda one: name_of(one[0]))
    wanted = sample.records[URLS] * len(every)
    taken = every[: max(min(FETCHES, len(every)), round(wanted))]
    yield from (({**task, RATE: min(1.0, wanted / len(taken))}, also) for task, also in taken)


def _files(task: dict[str, Any], sizes: dict[str, InputFile], sample: SampledParts) -> Iterator[dict[str, Any]]:
    entries = {f"{place} {entry['path']}": (entry, state)
               for place, (entry, state) in enumerate(zip(task["entries"], task["state"], strict=True))}  # fmt: skip
    parts = [
        FilePart(name, sizes[entry["path"]].bytes if entry["path"] in sizes else 0, 0) for name, (entry, _) in entries.items()
    ]
    taken = evenly(parts, sample.fraction)
    sample.add(task["kind"], parts, taken, True, 1.0)
    if taken:
        pairs = [entries[part.path] for part in taken]
        yield {**task, "entries": [entry for entry, _ in pairs], "state": [state for _, state in pairs], RATE: 1.0}
