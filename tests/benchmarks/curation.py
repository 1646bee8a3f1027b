"""What preparing text with stages costs by the size of the input: CPU seconds a GB of each kind of task, and peak memory.

    PYTHONPATH=. python tests/benchmarks/curation.py [--gb 1 4] [--memory-limit 268435456]

Writes JSON lines of English-like words, a seventh of them near duplicates and a twentieth exact ones, and makes a dataset of them
in this process, one task after another, without Ray: so CPU seconds are the tasks' own, whatever else the machine does. Each size
runs in a process of its own, whose peak memory is that of its largest task and of the driver's records.
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
    """Runs tasks in their order, once each, and adds up the CPU seconds of each kind."""

    cpu: dict[str, float] = {}

    def run(self, kind, function, tasks, cpus=1, valid=lambda record: True, pooled=False):
        for number, (task_number, task, record) in enumerate(self._looked_up(kind, tasks, valid)):
            assert record is None and number == task_number
            start = time.process_time()
            made = function(self.work.spill, **task.arguments, **task.shared)
            self.cpu[kind] = self.cpu.get(kind, 0.0) + time.process_time() - start
            made["seconds"] = 0.0
            self.work.finish(kind, task.key, made)
            yield number, made


def write(path: Path, size: int) -> None:
    """Writes about `size` bytes of documents."""
    rng = random.Random(0)
    letters = "eeeeetttaaaooiinnsshrrdlucmfwygpbvk"
    vocabulary = ["".join(rng.choices(letters, k=rng.randrange(1, 11))) for _ in range(30_000)]
    weights = [1 / (i + 10) for i in range(len(vocabulary))]
    written, recent = 0, list[str]()
    with path.open("w") as f:
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


def measure(size: int, memory_limit: int) -> None:
    """Prints one row: the size, documents, CPU seconds by kind of task, and the peak of memory above the start's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        write(Path(folder) / "in" / "a.jsonl", size)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        flow = Timed(Work(Location(f"{folder}/work")))
        output = Location(f"{folder}/out")
        source = TextSource(f"{folder}/in", Rules())
        stages = [parse(entry) for entry in STAGES]
        making = Making(flow, source, output, BPE, None, stages, memory_limit, memory_limit // 8, 1_000_000)
        _, meta = making.run(sources.listing(f"{folder}/in"))
        gb, cpu = size / 1e9, time.process_time() - start
        total: dict[str, float] = {}
        for kind, seconds in flow.cpu.items():
            name = "minhash" if kind.startswith("minhash") else kind
            total[name] = total.get(name, 0.0) + seconds
        parts = ", ".join(f"{kind} {seconds / gb:.0f}" for kind, seconds in total.items())
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        driver = cpu - sum(total.values())
        read = json.loads(output.join(meta["curation"]["funnel"]).read())["read"]["kept"]
        print(f"{gb:.2f} GB: {meta['documents']:,} of {read:,} documents; peak {peak} MiB; CPU s/GB {cpu / gb:.0f}: {parts}, "
              f"driver {driver / gb:.0f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--memory-limit", type=int, default=256 << 20)
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.one, arguments.memory_limit)
        return
    for gb in arguments.gb:
        limit = ["--memory-limit", str(arguments.memory_limit)]
        subprocess.run([sys.executable, __file__, "--one", str(int(gb * 1e9)), *limit], check=True)


if __name__ == "__main__":
    main()
