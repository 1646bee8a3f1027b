"""Measures the cost of finding similar images, by their number: CPU seconds per million, and peak memory.

    python -m tests.benchmarks.similar_images [--images 100000 400000] [--memory-limit 67108864]

Spills rows like the image pipeline, without images (one byte for each), with random perceptual hashes. A seventh are near
another, and a twentieth have another's pixels. Runs `similar_images` on them in this process, one task after another and without
Ray, so CPU seconds are the tasks' own. Each number runs in a separate process.
"""

from __future__ import annotations

import tempfile

import numpy as np
from heliostat.curation.engine import Curated
from heliostat.curation.registry import parse
from heliostat.curation.segment import Spiller
from heliostat.curation.stage import Document, Picture
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.benchmarks import harness
from tests.benchmarks.curation import Timed

RUN_BYTES = 8 << 20  # of the rows of a run


def spill(flow: Timed, images: int) -> Curated:
    rng, out = np.random.default_rng(0), Spiller(flow.work.spill, RUN_BYTES)
    looks = rng.integers(-(2**63), 2**63, images)
    near = rng.random(images) < 1 / 7
    looks[near] = looks[rng.integers(0, images, int(near.sum()))] ^ (1 << rng.integers(0, 62, int(near.sum())))
    hashes = rng.integers(0, 256, (images, 32), np.uint8)
    same = np.flatnonzero(rng.random(images) < 1 / 20)
    others = rng.integers(0, images, len(same))
    hashes[same], looks[same] = hashes[others], looks[others]
    for i, (digest, face) in enumerate(zip(hashes, looks.tolist(), strict=True)):
        out.add(Document(f"part-{i % 1000:04d}.tar/{i:09d}", "a caption", {}, Picture(b"x", digest.tobytes(), face, (1, 1))))
    spilled = Curated()
    spilled.runs = spilled.take(out.record({}))
    return spilled


def measure(images: int, memory_limit: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        flow = Timed(Work(Location(folder)))
        spilled = spill(flow, images)
        before = harness.memory("VmHWM")
        left = parse({"stage": "similar_images"}).compare(flow, spilled, 0, memory_limit)
        cpu = sum(flow.seconds.values())
        kinds = ", ".join(f"{kind.split('-')[-1]} {seconds:.1f}" for kind, seconds in flow.seconds.items())
        return [f"{sum(run.rows for run in left):,}", f"{cpu:.1f}", f"{cpu / images * 1e6:.0f}",
                f"{harness.memory('VmHWM') - before:.0f}", kinds]  # fmt: skip


def main() -> None:
    given = harness.arguments(__doc__, images=[100_000, 400_000], memory_limit=64 << 20)
    harness.head("images", "kept", "CPU s", "CPU s a million", "MiB above the spilling's peak", "by kind of task")
    for images in given.images:
        harness.row(f"{images:,}", *harness.apart(measure, images, given.memory_limit)[0])


if __name__ == "__main__":
    main()
