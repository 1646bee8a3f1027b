"""Divides large compressed files into parts that tasks can read at the same time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from heliostat.curation import readers
from heliostat.curation.pieces import FilePart
from heliostat.curation.readers import survey
from heliostat.curation.readers.survey import Survey
from heliostat.curation.text import sources, tasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import key

log = logging.getLogger(__name__)

NAMED = 3  # files that a warning names


def divided(flow: Flow, input: str, cut: list[list[FilePart]], target: int, limit: int) -> Iterator[list[FilePart]]:
    """Yields the pieces of an input. Replaces the ranges of compressed files with parts of about `target` bytes at which readers
    can begin. `limit`: the maximum decompressed bytes of a file.

    A file is one part if it is damaged or exceeds `limit`, because what is read before the fault must not depend on the parts.
    """
    ranges = dict[str, list[FilePart]]()
    for part, *_ in cut:
        if part.stop is not None and readers.framed(part.path or input):
            ranges.setdefault(part.path, []).append(part)
    parts = _surveyed(flow, input, ranges, target, limit)
    again = {path: [replace(ranges[path][0], stop=ranges[path][0].bytes)] for path in ranges if parts[path] is None}
    parts |= _surveyed(flow, input, again, target, limit)
    if undivided := [path for path in again if parts[path] is None]:
        log.warning("input: %d large compressed files are read by one task each, because they are damaged, or have more than "
            "max_file_bytes (%d) decompressed, for example %s. To read these files in parallel, compress them again, or raise "
            "max_file_bytes", len(undivided), limit, sources.examples([path or input for path in undivided[:NAMED]]))  # fmt: skip
    for piece in cut:
        part = piece[0]
        if part.path not in ranges:
            yield piece
        elif part.start == 0:
            yield from ([one] for one in parts[part.path] or [replace(part, stop=None)])


def _surveyed(
    flow: Flow, input: str, ranges: dict[str, list[FilePart]], target: int, limit: int
) -> dict[str, list[FilePart] | None]:
    """Surveys the ranges of files. Returns each file's parts; None for a file whose surveys don't fit together."""

    def work() -> Iterator[Task]:
        for part in (part for parts in ranges.values() for part in parts):
            arguments = {"part": part, "target": target, "limit": limit}
            yield Task(key("survey", input, part.identity, target, limit), {"input": input, **arguments})

    if not ranges:
        return {}
    surveys = (Survey.of(record["survey"]) for record in flow.all("survey", tasks.survey, work(), reads=True))
    return {path: survey.split(parts, list(islice(surveys, len(parts))), limit) for path, parts in ranges.items()}
