"""What preparing text with stages costs by the size of the input: CPU seconds a GB and peak memory of each kind of task.

    PYTHONPATH=. python tests/benchmarks/curation.py [--gb 1 4] [--memory-limit 268435456] [--folder FOLDER]
        [--no-shards]

Writes JSON lines of English-like words, a seventh of them near duplicates and a twentieth exact ones, and makes a dataset of them
in this process, one task after another, without Ray: so CPU seconds are the tasks' own, whatever else the machine does. Each size
runs in a process of its own, behind a small run that is thrown away. A task's peak is the most memory that the process has had
during it (the kernel's high-water mark, set back before each) above what it had behind the small run: what earlier tasks have
left in it counts too. With a folder, input and work are kept in it, and a run that was ended goes on: seconds and peaks of
finished tasks are in their records, those of the driver are the last start's.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
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

from tests.unit.build_curation import HereFlow

STAGES = [{"stage": "length", "min_words": 50}, {"stage": "minhash"}]
BPE = {"vocab_size": 8192, "train_bytes": 5_000_000, "path": None, "end_of_document": "<|endoftext|>"}


@dataclass
class Timed(HereFlow):
    """Runs tasks in their order, once each, and adds up the CPU seconds of each kind; peaks are MiB above `before`."""

    now: float = 0.0
    before: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)

    def run(self, kind, function, tasks, cpus=1, valid=lambda record: True, pooled=False):
        name = "minhash" if kind.startswith("minhash") else kind
        for number, task, made in self._looked_up(kind, tasks, valid):
            if made is None:
                pa.set_memory_pool(pa.system_memory_pool())  # as `flow.execute` does
                Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
                start = time.process_time()
                made = function(self.work.spill, **task.arguments, **task.shared)
                spent = time.process_time() - start
                made |= {"seconds": spent, "peak": memory("VmHWM") - self.before}
                pa.default_memory_pool().release_unused()
                self.now += spent
                self.work.finish(kind, task.key, made)
            self.cpu[name] = self.cpu.get(name, 0.0) + made["seconds"]
            self.peaks[name] = max(self.peaks.get(name, 0.0), made["peak"])
            self.tasks[name] = self.tasks.get(name, 0) + 1
            yield number, made


def memory(name: str) -> float:
    """Returns a line of this process's status, in MiB: VmRSS now, VmHWM at most since it was set back."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


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
    """Makes a dataset of the folder's input; returns what ran it, and how many documents stay."""
    flow = Timed(Work(Location(f"{folder}/work")))
    flow.before = memory("VmRSS")
    source, stages = TextSource(f"{folder}/in", TextRules()), [parse(entry) for entry in STAGES]
    making = TextMaking(flow, source, Location(f"{folder}/out"), stages, memory_limit, tokenizer=BPE, given=None,
                        shard_bytes=memory_limit // 8, chunk_tokens=1_000_000)  # fmt: skip
    found = (making.run if shards else making.curated)(sources.listing(f"{folder}/in"))
    return flow, found[1]["documents"] if shards else sum(run.rows for run in found.runs)


def measure(size: int, memory_limit: int, folder: Path, shards: bool) -> None:
    """Prints a table of the kinds of tasks: their number, CPU seconds a GB, and the peak of memory above the start's."""
    with tempfile.TemporaryDirectory() as small:
        (Path(small) / "in").mkdir()
        write(Path(small) / "in" / "a.jsonl", 1_000_000)
        made(Path(small), memory_limit, shards)
    (folder / "in").mkdir(parents=True, exist_ok=True)
    if not (folder / "in" / "a.jsonl").exists():
        write(folder / "in" / "a.jsonl", size)
    gc.collect()
    pa.default_memory_pool().release_unused()
    start = time.process_time()
    flow, kept = made(folder, memory_limit, shards)
    gb, driver = size / 1e9, time.process_time() - start - flow.now
    print(f"{gb:.2f} GB, memory_limit {memory_limit >> 20} MiB above {flow.before:.0f} MiB: {kept:,} documents stay\n")
    print("| task | number | CPU s a GB | peak, MiB |\n|---|---|---|---|")
    for kind, seconds in flow.cpu.items():
        print(f"| {kind} | {flow.tasks[kind]} | {seconds / gb:.0f} | {flow.peaks[kind]:.0f} |")
    print(f"| the driver | | {driver / gb:.0f} | |")
    print(f"| all | | {(sum(flow.cpu.values()) + driver) / gb:.0f} | {max(flow.peaks.values()):.0f} |\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--memory-limit", type=int, default=256 << 20)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--no-shards", action="store_true", help="without tokenizer and shards: reading and stages alone")
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one, arguments.memory_limit, arguments.folder, not arguments.no_shards)
        return
    for gb in arguments.gb:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.folder or Path(temporary)) / f"{gb:g}"
            more = ["--memory-limit", str(arguments.memory_limit), "--folder", str(folder)]
            more += ["--no-shards"] if arguments.no_shards else []
            subprocess.run([sys.executable, __file__, "--one", str(int(gb * 1e9)), *more], check=True)


if __name__ == "__main__":
    main()
