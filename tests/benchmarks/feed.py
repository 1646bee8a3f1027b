"""Measures the cost of one stream's executor: CPU seconds of its process per block, and the resulting rate.

    python -m tests.benchmarks.feed [--samples 262144] [--consumers 4] [--kind tokens images]

Samples are those of ingest.py. Images are rows of about 7.4 KB, like latents of 32 x 32 x 4 in fp16 (8 KB). CPU time hardly
depends on the machine's other work, so the rate is the limit of one core of the driver's node, not this machine's throughput.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from tests.benchmarks import harness
from tests.benchmarks.ingest import LENGTH, SAMPLE_BYTES, WINDOW_BYTES
from tests.benchmarks.ingest_contenders import contenders, samples
from tests.benchmarks.ingest_contenders.task import Task


def processor_seconds(_: Any) -> float:
    return time.process_time()


def main() -> None:
    options = harness.arguments(__doc__, samples=262_144, consumers=4, kind=["tokens", "images"])
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    harness.head("samples", "blocks", "MB a block", "ms a block", "blocks/s a core", "samples/s a core", "GB/s a core")
    for kind in options.kind:
        with tempfile.TemporaryDirectory(prefix="feed-") as name:
            count = options.samples // (1 if kind == "tokens" else 4)
            samples.make(kind, Path(name), count, LENGTH)
            window = WINDOW_BYTES // SAMPLE_BYTES[kind]
            task = Task("ours", kind, name, None, options.consumers, count, LENGTH, 32, window, name)
            parts = contenders.our_split(task)
            coordinator: Any = parts[0]._coord_actor
            began = ray.get(coordinator.__ray_call__.remote(processor_seconds))

            def consumed(part: Any) -> int:
                return sum(1 for _ in part.iter_batches(batch_size=1, batch_format="pyarrow"))

            with ThreadPoolExecutor(len(parts)) as pool:
                blocks = sum(pool.map(consumed, parts))
            seconds = ray.get(coordinator.__ray_call__.remote(processor_seconds)) - began
            ray.kill(coordinator)
            size = count * SAMPLE_BYTES[kind]
            harness.row(kind, blocks, f"{size / blocks / 1e6:.1f}", f"{seconds / blocks * 1e3:.1f}", f"{blocks / seconds:,.0f}",
                        f"{count / seconds:,.0f}", f"{size / seconds / 1e9:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
