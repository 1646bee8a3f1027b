"""Measures the cost of preparing text with stages, by the input's size: CPU seconds per GB and peak memory by kind of task.

    python -m tests.benchmarks.curation [--gb 1 4] [--memory-limit 268435456] [--folder FOLDER]
        [--no-shards]

Writes JSON lines of English-like words: a seventh are near-duplicates, and a twentieth exact ones. Makes a dataset of them in
this process, one task after another, without Ray, so CPU seconds don't depend on the machine's other work.

Each size runs in a separate process, after a small discarded run. A task's peak is the process's highest memory during the task
(the kernel's high-water mark, reset before each) above that after the small run. It includes memory that earlier tasks left.

With a folder, input and work stay in it, and an interrupted run resumes: seconds and peaks of finished tasks are in their
records, and those of the driver are from the last start.
"""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from heliostat.curation.registry import parse
from heliostat.curation.text import sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.making import TextMaking
from heliostat.curation.text.tasks import TextSource
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.benchmarks import harness
from tests.unit.build_curation import HereFlow

STAGES = [{"stage": "length", "min_words": 50}, {"stage": "minhash"}]
BPE = {"vocab_size": 8192, "train_bytes": 5_000_000, "path": None, "end_of_document": "<|endoftext|>"}


@dataclass
class Timed(HereFlow):
    """Runs tasks in order, once each, and sums the CPU seconds of each kind. Peaks are MiB above `before`."""

    now: float = 0.0
    before: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)

    def run(self, kind, function, tasks, cpus=1, valid=lambda record: True, pooled=False):
        name = "minhash" if kind.startswith("minhash") else kind
        for number, task, made, _ in self._looked_up(kind, tasks, valid):
            if made is None:
                pa.set_memory_pool(pa.system_memory_pool())  # as `flow.execute` does
                harness.forget_peak()
                start = time.process_time()
                made = function(self.work.spill, **task.arguments, **task.shared)
                spent = time.process_time() - start
                made |= {"seconds": spent, "peak": harness.memory("VmHWM") - self.before}
                pa.default_memory_pool().release_unused()
                self.now += spent
                self.work.finish(kind, task.key, made)
            self.cpu[name] = self.cpu.get(name, 0.0) + made["seconds"]
            self.peaks[name] = max(self.peaks.get(name, 0.0), made["peak"])
            self.tasks[name] = self.tasks.get(name, 0) + 1
            yield number, made


def write(path: Path, size: int) -> None:
    """Writes about `size` bytes of documents."""
    rng = random.Random(0)
    letters = "eeeeetttaaaooiinnsshrrdlucmfwygpbvk"
    vocabulary = ["".join(rng.choices(letters, k=rng.randrange(1, 11))) for _ in range(30_000)]
    weights, draw = np.cumsum(1 / (np.arange(len(vocabulary)) + 10)), np.random.default_rng(0)
    written, recent, part = 0, list[str](), path.with_suffix(".part")
    with part.open("w") as f:
        while written < size:
            kind = rng.random()
            if recent and kind < 0.14:
                text = rng.choice(recent) + " " + rng.choice(vocabulary)
            elif recent and kind < 0.19:
                text = rng.choice(recent)
            else:
                drawn = np.searchsorted(weights, weights[-1] * draw.random(rng.randrange(40, 900)), side="right")
                text = " ".join(map(vocabulary.__getitem__, drawn.tolist()))
                recent = [*recent[-500:], text]
            written += f.write(json.dumps({"text": text}) + "\n")
    part.rename(path)


def made(folder: Path, memory_limit: int, shards: bool) -> tuple[Timed, int]:
    """Makes a dataset of the folder's input; returns the flow that ran it, and the number of kept documents."""
    flow = Timed(Work(Location(f"{folder}/work")))
    flow.before = harness.memory("VmRSS")
    source, stages = TextSource(f"{folder}/in", TextRules()), [parse(entry) for entry in STAGES]
    making = TextMaking(flow, source, Location(f"{folder}/out"), stages, memory_limit, tokenizer=BPE, given_tokenizer=None,
                        shard_bytes=memory_limit // 8, chunk_tokens=1_000_000)  # fmt: skip
    found = (making.run if shards else making.curated)(sources.listing(f"{folder}/in"))
    return flow, found[1]["documents"] if shards else sum(run.rows for run in found.runs)


def measure(size: int, memory_limit: int, place: str, shards: bool) -> None:
    """Prints a table of the kinds of tasks: their number, CPU seconds a GB, and the peak of memory above the start's."""
    with tempfile.TemporaryDirectory() as small:
        (Path(small) / "in").mkdir()
        write(Path(small) / "in" / "a.jsonl", 1_000_000)
        made(Path(small), memory_limit, shards)
    folder = Path(place)
    (folder / "in").mkdir(parents=True, exist_ok=True)
    if not (folder / "in" / "a.jsonl").exists():
        write(folder / "in" / "a.jsonl", size)
    gc.collect()
    pa.default_memory_pool().release_unused()
    start = time.process_time()
    flow, kept = made(folder, memory_limit, shards)
    gb, driver = size / 1e9, time.process_time() - start - flow.now
    print(f"{gb:.2f} GB, memory_limit {memory_limit >> 20} MiB above {flow.before:.0f} MiB: {kept:,} documents stay\n")
    harness.head("task", "number", "CPU s a GB", "peak, MiB")
    for kind, seconds in flow.cpu.items():
        harness.row(kind, flow.tasks[kind], f"{seconds / gb:.0f}", f"{flow.peaks[kind]:.0f}")
    harness.row("the driver", "", f"{driver / gb:.0f}", "")
    harness.row("all", "", f"{(sum(flow.cpu.values()) + driver) / gb:.0f}", f"{max(flow.peaks.values()):.0f}")


def main() -> None:
    given = harness.arguments(__doc__, gb=[1.0, 4.0], memory_limit=256 << 20, folder={"type": Path}, no_shards=False)
    for gb in given.gb:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (given.folder or Path(temporary)) / f"{gb:g}"
            harness.apart(measure, int(gb * 1e9), given.memory_limit, str(folder), not given.no_shards)


if __name__ == "__main__":
    main()
