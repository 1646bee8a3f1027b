"""What finding images that look alike costs by their number: CPU seconds a million, and peak memory.

    PYTHONPATH=. python tests/benchmarks/similar_images.py [--images 100000 400000] [--memory-limit 67108864]

Spills rows as the image pipeline does, without images (a byte stands for each), with random perceptual hashes of which a seventh
are near another and a twentieth have another's pixels, and takes them through `similar_images` in this process, one task after
another and without Ray: so CPU seconds are the tasks' own. Each number runs in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile

import numpy as np
from heliostat.curation.engine import Curated
from heliostat.curation.registry import parse
from heliostat.curation.segment import Spiller
from heliostat.curation.stage import Document, Picture
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

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
    found = Curated()
    found.runs = found.take(out.record({}))
    return found


def measure(images: int, memory_limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        flow = Timed(Work(Location(folder)))
        found = spill(flow, images)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stage = parse({"stage": "similar_images"})
        left = stage.compare(flow, found, 0, memory_limit)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu = sum(flow.cpu.values())
        kinds = ", ".join(f"{kind.split('-')[-1]} {seconds:.1f}" for kind, seconds in flow.cpu.items())
        kept = sum(run.rows for run in left)
        print(
            f"| {images:,} | {kept:,} | {cpu:.1f} | {cpu / images * 1e6:.0f} | {(peak - before) / 1024:.0f} | {kinds} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--memory-limit", type=int, default=64 << 20)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        measure(given.images[0], given.memory_limit)
        return
    head = ("images", "kept", "CPU s", "CPU s a million", "MiB above the spilling's peak", "by kind of task")
    print(f"| {' | '.join(head)} |\n|---|---|---|---|---|---|", flush=True)
    for images in given.images:
        command = [sys.executable, __file__, "--alone", "--images", str(images), "--memory-limit", str(given.memory_limit)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
