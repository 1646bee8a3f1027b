"""Drops images that look like another image of the dataset: the images' 64-bit perceptual hashes differ in few bits.

The hash is dHash (Krawetz, Kind of Like That, 2013). Each bit shows whether one of 8 x 8 areas of the grayscale image is brighter
than the area to its right. The hash survives scaling, compression, and slight changes of color, but not crops, rotations, or
mirroring. The stage finds all pairs of images whose hashes differ in at most `distance` bits. The stage visits images in the
order of their pixel hashes, and drops an image within `distance` of an earlier image that stays. So two images that stay are
never within `distance` of each other, and every dropped image is within `distance` of an image that stays. A task has only a part
of the hashes in memory, for any number of images.
"""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

from pydantic import Field

from heliostat.curation import alike
from heliostat.curation.comparing import RUNS, conclude
from heliostat.curation.comparing import parts as parts_of
from heliostat.curation.engine import Curated, filled
from heliostat.curation.segment import SpilledRun
from heliostat.curation.stage import GlobalStage
from heliostat.errors import HeliostatError
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import by_parts
from heliostat.tasks.work import key

IMAGE_BYTES, KEY_BYTES = 500, 160  # bytes of memory per image, and per key or pair, in a task, including the sort
ROUNDS = 200  # far more than the longest chain of images that wait for each other


class SimilarImages(GlobalStage):
    of_images: ClassVar[bool] = True
    reasons: ClassVar = {"duplicate": "the pixels of another image", "near_duplicate": "almost the pixels of another image"}

    distance: int | None = Field(3, ge=0, le=16)
    """Maximum Hamming distance of the 64-bit perceptual hashes of near-duplicates. null: drops only images with equal pixels.
    Values above 8 take long on large datasets."""

    def compare(self, flow: Flow, curated: Curated, number: int, memory_limit: int) -> list[SpilledRun]:
        kind, runs = f"alike-{number}", curated.runs
        exact, distance = self.distance is None, self.distance or 0
        shown = flow.all(f"{kind}-faces", alike.faces, _facing(runs, memory_limit, exact))
        faces, parts = [r["faces"] for r in shown], parts_of(sum(r["rows"] for r in shown) * IMAGE_BYTES, memory_limit)
        named = [] if exact else self._near(flow, kind, faces, parts, distance, sum(r["rows"] for r in shown), memory_limit)
        judged = flow.all(f"{kind}-judge", alike.judge, by_parts(flow, kind, parts, faces, {"named": named}))
        return conclude(flow, curated, self, number, kind, judged, memory_limit)

    def _near(self, flow: Flow, kind: str, faces: list[str], parts: int, distance: int, images: int,
              memory_limit: int) -> list[str]:  # fmt: skip
        """Finds the pairs of similar images, and chooses the images that stay. Returns the names of the temporary files with the
        choices (`alike.name`)."""
        count = alike.blocks(distance, images)
        grouped = flow.all(f"{kind}-group", alike.group, by_parts(flow, kind, parts, faces, distance=distance, count=count))
        under, meeting = (
            [n for r in grouped for n in r["keys"]],
            parts_of(sum(r["rows"] for r in grouped) * KEY_BYTES, memory_limit),
        )
        paired = flow.all(f"{kind}-pairs", alike.pairs, by_parts(flow, kind, meeting, under, distance=distance)) if under else []
        edges = [name for r in paired for name in (r["edges"], *r.get("further", ()))]
        messages, fates, waiting = list[str](), list[str](), sum(r["rows"] for r in paired)
        shares = parts_of(waiting * KEY_BYTES, memory_limit)
        for _ in range(ROUNDS if waiting else 0):
            settled = flow.all(f"{kind}-settle", alike.settle, by_parts(flow, kind, shares, edges, {"messages": messages}))
            edges, messages = [r["edges"] for r in settled], [r["messages"] for r in settled]
            fates += [r["fates"] for r in settled]
            if not (waiting := sum(r["rows"] for r in settled)):
                break
        if waiting:
            raise HeliostatError(
                f"{kind}: the choice of images didn't converge within {ROUNDS} rounds. Lower distance in the stage similar_images"
            )
        return [r["names"] for r in flow.all(f"{kind}-names", alike.name, by_parts(flow, kind, parts, faces, {"fates": fates}))]


def _facing(runs: list[SpilledRun], memory_limit: int, exact: bool) -> CountedTasks:
    """Returns the tasks that list the hashes of the images in several runs each."""
    groups = list(filled(runs, lambda run: run.rows, memory_limit // IMAGE_BYTES, RUNS))

    def task(group: list[SpilledRun], first: int) -> Task:
        decisions = [[run.name, run.decided] for run in group]
        arguments = {"first": first, "runs": group, "exact": exact}
        return Task(key("faces", first, decisions, exact), arguments, bytes=sum(run.bytes for run in group))

    return CountedTasks(map(task, groups, accumulate(map(len, groups), initial=0)), len(groups))
