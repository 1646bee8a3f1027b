"""What preparing text with stages costs by the size of the input: CPU seconds a GB of each kind of task, and peak memory.

    PYTHONPATH=. python tests/benchmarks/curation.py [--gb 1 4] [--memory-limit 268435456] [--folder FOLDER]
        [--no-shards]

Writes JSON lines of English-like words, a seventh of them near duplicates and a twentieth exact ones, and makes a dataset of them
in this process, one task after another, without Ray: so CPU seconds are the tasks' own, whatever else the machine does. Each size
runs in a process of its own, whose peak memory is that of its largest task and of the driver's records. With a folder, input and
work are kept in it, and a run that was ended goes on: seconds and peaks of finished tasks are in their records, those of the
driver are the last start's.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from heliostat.curation.registry import parse
from heliostat.curation.work import Work
from heliostat.pipelines.text import sources
from heliostat.pipelines.text.documents import Rules
from heliostat.pipelines.text.making import Making
from heliostat.pipelines.text.tasks import TextSource
from heliostat.storage import Location

from tests.unit.build_curation import HereFlow

STAGES = [{"stage": "length", "min_words": 50}, {"stage": "minhash"}]
BPE = {"vocab_size": 8192, "train_bytes": 5_000_000, "path": None, "end_of_document": "<|endoftext|>"}


class Timed(HereFlow):
    """Runs tasks in their order, once each, and adds up the CPU seconds of each kind; `peak` is the memory above `before`."""

    cpu: dict[str, float] = {}
    now, before, peak = 0.0, 0, 0

    def run(self, kind, function, tasks, cpus=1, valid=lambda record: True, pooled=False):
        for number, task, made in self._looked_up(kind, tasks, valid):
            if made is None:
                start = time.process_time()
                made = function(self.work.spill, **task.arguments, **task.shared)
                spent = time.process_time() - start
                made |= {"seconds": spent, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before}
                self.now += spent
                self.work.finish(kind, task.key, made)
            self.cpu[kind] = self.cpu.get(kind, 0.0) + made["seconds"]
            self.peak = max(self.peak, made["peak"])
            yield number, made


def write(path: Path, size: int) -> None:
    """Writes about `size` bytes of documents."""
    rng = random.Random(0)
    letters = "eeeeetttaaaooiinnsshrrdlucmfwygpbvk"
    vocabulary = ["".join(rng.choices(letters, k=rng.randrange(1, 11))) for _ in range(30_000)]
    weights = [1 / (i + 10) for i in range(len(vocabulary))]
    written, recent, part = 0, list[str](), path.with_suffix(".part")
    with part.open("w") as f:
        while written < size:
            kind = rng.random()
            if recent and kind < 0.14:
                text = rng.choice(recent) + " " + rng.choice(vocabulary)
            elif recent and kind < 0.19:
                text = rng.choice(recent)
            else:
                text = " ".join(rng.choices(vocabulary, weights, k=rng.randrange(40, 900)))
                recent = [*recent[-500:], text]
            written += f.write(json.dumps({"text": text}) + "\n")
    part.rename(path)


def measure(size: int, memory_limit: int, folder: Path, shards: bool) -> None:
    """Prints one row: the size, documents, CPU seconds by kind of task, and the peak of memory above the start's."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    if not (folder / "in" / "a.jsonl").exists():
        write(folder / "in" / "a.jsonl", size)
    start = time.process_time()
    flow = Timed(Work(Location(f"{folder}/work")))
    flow.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = Location(f"{folder}/out")
    source = TextSource(f"{folder}/in", Rules())
    stages = [parse(entry) for entry in STAGES]
    making = Making(flow, source, output, BPE, None, stages, memory_limit, memory_limit // 8, 1_000_000)
    found = (making.run if shards else making.curated)(sources.listing(f"{folder}/in"))
    gb, driver = size / 1e9, time.process_time() - start - flow.now
    total: dict[str, float] = {}
    for kind, seconds in flow.cpu.items():
        name = "minhash" if kind.startswith("minhash") else kind
        total[name] = total.get(name, 0.0) + seconds
    parts = ", ".join(f"{kind} {seconds / gb:.0f}" for kind, seconds in total.items())
    kept = found[1]["documents"] if shards else sum(run.rows for run in found.runs)
    print(f"{gb:.2f} GB: {kept:,} documents stay; peak {flow.peak >> 10} MiB; CPU s/GB "
          f"{(sum(total.values()) + driver) / gb:.0f}: {parts}, driver {driver / gb:.0f}", flush=True)  # fmt: skip


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
