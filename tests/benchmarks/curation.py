"""Measures the cost of preparing text with stages, by the input's size: CPU seconds per GB and peak memory by kind of task.

    python -m tests.benchmarks.curation [--gb 1 4] [--memory-limit 268435456] [--folder FOLDER] [--corpus corpus.jsonl]
        [--workers 1] [--shards-in 1] [--no-shards]

Writes JSON lines of English-like words: a seventh are near-duplicates, and a twentieth exact ones. With a corpus of real
documents (`curation_corpus.py`), recombines its paragraphs instead (`recombined.py`), and compresses the files. Makes a dataset
of them without Ray: worker processes run one task after another, so the memory of the driver and of a worker are separate, and
CPU seconds depend little on the machine's other work. With `--shards-in N`, runs one in N of the tasks that write shards, and
multiplies their seconds by N.

Each size runs in separate processes, after a small discarded run. A task's peak is the worker's highest memory during the task
(the kernel's high-water mark, reset before each) above that after the small run. It includes memory that earlier tasks left.

With a folder, input and work stay in it, and an interrupted run resumes: seconds and peaks of finished tasks are in their
records, and those of the driver are in a file.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from heliostat.curation.registry import parse
from heliostat.curation.text import sources
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.making import TextMaking
from heliostat.curation.text.tasks import TextSource
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work

from tests.benchmarks import harness, recombined
from tests.unit.build_curation import HereFlow

STAGES = [{"stage": "length", "min_words": 50}, {"stage": "minhash"}]
Running = dict[Future, tuple[int, str]]  # call -> number and key of its task
STAGES_OF_CORPUS = [{"stage": "length", "min_chars": 12_000}, {"stage": "minhash"}]  # drops four fifths of the bytes
BPE = {"vocab_size": 8192, "train_bytes": 5_000_000, "path": None, "end_of_document": "<|endoftext|>"}


def settled() -> float:
    """Frees what this process doesn't need; returns its memory in MiB."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    return harness.memory("VmRSS")


def measured(function: Callable[..., dict[str, Any]], *given: Any, **arguments: Any) -> dict[str, Any]:
    """Runs a task in this process like `flow.execute`. Adds its CPU seconds and the peak of memory to its record."""
    pa.set_memory_pool(pa.system_memory_pool())
    harness.forget_peak()
    start = time.process_time()
    made = function(*given, **arguments)
    made |= {"seconds": time.process_time() - start, "peak": harness.memory("VmHWM")}
    pa.default_memory_pool().release_unused()
    return made


@dataclass
class Spent:
    """Holds the number, the CPU seconds, and the highest memory of the tasks of a kind."""

    tasks: int = 0
    cpu: float = 0.0
    peak: float = 0.0

    def add(self, record: dict[str, Any]) -> None:
        self.tasks, self.cpu, self.peak = self.tasks + 1, self.cpu + record["seconds"], max(self.peak, record["peak"])


@dataclass
class Timed(HereFlow):
    """Runs tasks in order, once each, in the pool's processes, and counts what each kind takes. Runs one in `shards_in` of the
    tasks that write shards."""

    pool: ProcessPoolExecutor = field(default_factory=lambda: ProcessPoolExecutor(1, get_context("spawn")))
    workers: int = 1
    shards_in: int = 1
    spent: dict[str, Spent] = field(default_factory=dict)
    left_out: int = 0
    began: float = field(default_factory=time.process_time)
    before: float = field(default_factory=lambda: harness.memory("VmRSS"))
    earlier: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.place.exists():
            self.earlier = tuple(json.loads(self.place.read_text()))

    def run(self, kind, function, tasks, cpus=1, valid=lambda record: True, **pools):
        name, running = "minhash" if kind.startswith("minhash") else kind, Running()
        for number, task, made, _ in self._looked_up(kind, tasks, valid):
            if kind == "shards" and number % self.shards_in:
                self.left_out += 1
                continue
            if made is not None:
                yield number, self.counted(name, made)
                continue
            while len(running) >= self.workers:
                yield from self.ended(name, kind, running)
            call = self.pool.submit(measured, function, self.work.spill, **task.arguments, **task.shared)
            running[call] = number, task.key
        while running:
            yield from self.ended(name, kind, running)

    def ended(self, name: str, kind: str, running: Running) -> Iterator[tuple[int, dict[str, Any]]]:
        """Waits for a task, and writes the records of the tasks that have ended. Yields (number, record) of each."""
        for call in wait(running, return_when=FIRST_COMPLETED).done:
            number, key = running.pop(call)
            self.work.finish(kind, key, made := call.result())
            self.note()
            yield number, self.counted(name, made)

    def counted(self, name: str, made: dict[str, Any]) -> dict[str, Any]:
        self.spent.setdefault(name, Spent()).add(made)
        return made

    def note(self) -> None:
        """Writes the driver's CPU seconds and its highest memory so far to its file."""
        self.place.write_text(json.dumps(self.driver))

    @property
    def place(self) -> Path:
        return Path(self.work.location.path).parent / "driver.json"

    @property
    def driver(self) -> list[float]:
        """Returns the CPU seconds of the driver, and its highest memory in MiB above that at the start."""
        cpu, peak = self.earlier
        return [cpu + time.process_time() - self.began, max(peak, harness.memory("VmHWM") - self.before)]


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


def made(
    folder: Path, memory_limit: int, stages: list[dict[str, Any]], shards_in: int, pool: ProcessPoolExecutor, workers: int
) -> tuple[Timed, int]:
    """Makes a dataset of the folder's input, without shards if `shards_in` is 0. Returns the flow that ran it, and the number of
    kept documents."""
    flow = Timed(Work(Location(f"{folder}/work")), pool=pool, workers=workers, shards_in=shards_in)
    source, parsed = TextSource(f"{folder}/in", TextRules()), [parse(entry) for entry in stages]
    making = TextMaking(flow, source, Location(f"{folder}/out"), parsed, memory_limit, tokenizer=BPE, given_tokenizer=None,
                        shard_bytes=memory_limit // 8, chunk_tokens=1_000_000)  # fmt: skip
    flow.memory = memory_limit
    found = (making.run if shards_in else making.curated)(sources.listing(f"{folder}/in"))
    flow.note()
    return flow, found[1]["documents"] if shards_in else sum(run.rows for run in found.runs)


def write_input(folder: Path, size: int, corpus: str | None) -> None:
    """Writes the input into the folder `in`, unless it exists."""
    if (folder / "in").exists():
        return
    shutil.rmtree(part := folder / "in.part", ignore_errors=True)
    part.mkdir(parents=True)
    if corpus:
        recombined.write(part, Path(corpus), size)
    else:
        write(part / "a.jsonl", size)
    part.rename(folder / "in")


def measure(size: int, memory_limit: int, place: str, shards_in: int, corpus: str | None, workers: int) -> None:
    """Prints a table of the kinds of tasks: their number, CPU seconds per GB, and the peak of memory above the start's."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        with tempfile.TemporaryDirectory() as small:
            write_input(Path(small), 1_000_000, None)
            made(Path(small), memory_limit, STAGES, min(1, shards_in), pool, workers)
        write_input(folder := Path(place), size, corpus)
        before, gb = pool.submit(settled).result(), size / 1e9
        settled()
        harness.forget_peak()
        flow, kept = made(folder, memory_limit, STAGES_OF_CORPUS if corpus else STAGES, shards_in, pool, workers)
    print(f"{gb:g} GB, memory_limit {memory_limit >> 20} MiB above {before:.0f} MiB: {kept:,} documents stay\n")
    if flow.left_out and (shards := flow.spent.get("shards")):
        shards.cpu *= (shards.tasks + flow.left_out) / shards.tasks
        print(f"{shards.tasks} of {shards.tasks + flow.left_out} tasks for shards ran, and only these documents are counted\n")
    driver = Spent(0, *flow.driver)
    harness.head("task", "number", "CPU s per GB", "peak, MiB")
    for kind, spent in flow.spent.items():
        harness.row(kind, spent.tasks, f"{spent.cpu / gb:.1f}", f"{spent.peak - before:.0f}")
    harness.row("the driver", "", f"{driver.cpu / gb:.1f}", f"{driver.peak:.0f}")
    tasks = flow.spent.values()
    harness.row("all tasks and the driver", "", f"{(sum(one.cpu for one in tasks) + driver.cpu) / gb:.1f}",
                f"{max(one.peak for one in tasks) - before:.0f}")  # fmt: skip


def main() -> None:
    asked = harness.arguments(__doc__, gb=[1.0, 4.0], memory_limit=256 << 20, folder={"type": Path}, corpus={"type": Path},
                              workers=1, shards_in=1, no_shards=False)  # fmt: skip
    corpus, shards_in = str(asked.corpus.absolute()) if asked.corpus else None, 0 if asked.no_shards else asked.shards_in
    for gb in asked.gb:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (asked.folder or Path(temporary)).absolute() / f"{gb:g}"
            harness.apart(measure, int(gb * 1e9), asked.memory_limit, str(folder), shards_in, corpus, asked.workers)


if __name__ == "__main__":
    main()
