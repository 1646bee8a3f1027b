"""Measures the cost of preparing text with stages, by the input's size: CPU seconds per GB and peak memory by kind of task. Then
compares a dry run with the complete run.

    python -m tests.benchmarks.curation [--gb 1 4] [--memory-limit 268435456] [--folder FOLDER] [--corpus corpus.jsonl]
        [--sample 0.01] [--only-input]

Writes JSON lines of English-like words: a seventh are near-duplicates, and a twentieth exact ones. With a corpus of real
documents (`curation_corpus.py`), recombines its paragraphs instead (`recombined.py`), and compresses the files. Makes a dataset
of them without Ray: one worker process runs one task after another, so the memory of the driver and of the worker are separate,
and CPU seconds depend little on the machine's other work.

Each size runs in separate processes, after a small discarded run. A task's peak is the worker's highest memory during the task
(the kernel's high-water mark, reset before each) above that after the small run. It includes memory that earlier tasks left.
With `--sample`, a new worker then predicts the result of the last size from this share of its input.

With a folder, input and work stay in it, and an interrupted run resumes: seconds and peaks of finished tasks are in their
records, and those of the driver are in a file. With `--only-input`, only writes the inputs.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.storage.locations import Location
from heliostat.tasks import cpu_time
from heliostat.tasks.clusters import Cluster
from heliostat.tasks.work import Work
from pydantic import PrivateAttr

from tests.benchmarks import harness, recombined
from tests.unit.build_curation import HereFlow

STAGES = [{"stage": "length", "min_words": 50}, {"stage": "minhash"}]
STAGES_OF_CORPUS = [{"stage": "length", "max_chars": 1500}, {"stage": "minhash"}]  # drops seven eighths of the bytes
BPE = {"vocab_size": 8192, "train_bytes": 5_000_000}


def settled() -> float:
    """Frees what this process doesn't need; returns its memory in MiB."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    return harness.memory("VmRSS")


def measured(function: Callable[..., dict[str, Any]], *given: Any, **arguments: Any) -> dict[str, Any]:
    """Runs a task in this process like `flow.execute`. Adds its CPU seconds and the peak of memory to its record."""
    pa.set_memory_pool(pa.system_memory_pool())
    harness.forget_peak()
    start = cpu_time.now()
    made = function(*given, **arguments)
    made |= {"seconds": cpu_time.now() - start, "peak": harness.memory("VmHWM")}
    pa.default_memory_pool().release_unused()
    return made


def new_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


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
    """Runs tasks in order, once each, in the pool's process, and counts what each kind takes."""

    pool: ProcessPoolExecutor = field(default_factory=new_pool)
    spent: dict[str, Spent] = field(default_factory=dict)
    began: float = field(default_factory=time.process_time)
    before: float = field(default_factory=lambda: harness.memory("VmRSS"))
    earlier: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.place.exists():
            self.earlier = tuple(json.loads(self.place.read_text()))

    def _running(self, kind, function, tasks, cpus=1, valid=lambda record: True, **pools):
        name = "minhash" if kind.startswith("minhash") else kind
        for number, task, made, _ in self._looked_up(kind, tasks, valid):
            if made is None:
                made = self.pool.submit(measured, function, self.work.spill, **task.arguments, **task.shared).result()
                self.work.finish(kind, task.key, made)
                self.note()
            self._count(self.done, kind, made)
            self.spent.setdefault(name, Spent()).add(made)
            yield number, made

    def note(self) -> None:
        """Writes the driver's CPU seconds and its highest memory so far to its file."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self.place.write_text(json.dumps(self.driver))

    @property
    def place(self) -> Path:
        return Path(self.work.location.path).parent / "driver.json"

    @property
    def driver(self) -> list[float]:
        """Returns the CPU seconds of the driver, and its highest memory in MiB above that at the start."""
        cpu, peak = self.earlier
        return [cpu + time.process_time() - self.began, max(peak, harness.memory("VmHWM") - self.before)]


class MeasuredPipeline(TextPipeline):
    """Runs its tasks in the process of a pool."""

    _pool: ProcessPoolExecutor = PrivateAttr(default_factory=new_pool)
    _flow: Timed | None = PrivateAttr(default=None)

    @classmethod
    def over(cls, folder: Path, memory_limit: int, stages: list[dict[str, Any]], pool: ProcessPoolExecutor) -> MeasuredPipeline:
        """Returns the pipeline for the input in a folder."""
        one = cls(name="measured", input=f"{folder}/in", output=f"{folder}/out", tokenizer=BPE, stages=stages,
                  memory_limit=memory_limit, shard_bytes=memory_limit // 8)  # fmt: skip
        one._pool = pool
        return one

    def flow(self, work: Work | None = None, cluster: Cluster | None = None) -> Timed:
        self._flow = Timed(work or self.worked, pool=self._pool, memory=self.memory_limit)
        return self._flow

    def made(self) -> tuple[dict[str, float], Timed]:
        """Makes the dataset. Returns the documents after each stage, bytes, tokens, and CPU seconds; and the flow."""
        output = Location(self.output)
        meta = self.write(output, self.inputs())[1]
        assert self._flow is not None
        self._flow.note()
        funnel = json.loads(output.join(meta["curation"]["funnel"]).read())
        shard, documents = funnel["shard"], {name: part["kept"] for name, part in funnel.items() if name != "finish"}
        seconds = {f"CPU s of `{name}`": seconds for name, seconds in self._seconds.items()}
        return {**documents, "bytes": shard["kept_bytes"], "tokens": shard["counts"]["tokens"], **seconds,
                "CPU s of all tasks": sum(self._flow.seconds.values())}, self._flow  # fmt: skip

    def foretold(self, folder: Location, share: float) -> dict[str, float]:
        """Predicts the values of `made` from a share of the input, and the bounds of some of them."""
        report = self.predict(folder, self.inputs(), share)
        rows = report["funnel"]
        for note in report["notes"]:
            print(f"- {note}")
        hour = 3600
        return {**{row["stage"]: row["kept"] for row in rows}, "bytes": report["bytes"], "tokens": report["tokens"],
                **{f"CPU s of `{row['stage']}`": row["cpu_hours"] * hour for row in rows},
                "CPU s of all tasks": report["cpu_hours"] * hour,
                **{f"{row['stage']}{end}": row[f"kept{end}"] for row in rows for end in BOUNDS},
                **{f"{name}{end}": report[f"{name}{end}"] for name in ("bytes", "tokens") for end in BOUNDS},
                **{f"CPU s of all tasks{end}": report[f"cpu_hours{end}"] * hour for end in BOUNDS}}  # fmt: skip


BOUNDS = ("_low", "_high")


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


def measure(size: int, memory_limit: int, place: str, corpus: str | None) -> dict[str, float]:
    """Prints a table of the kinds of tasks: their number, CPU seconds per GB, and the peak of memory above the start's. Returns
    the values of `MeasuredPipeline.made`."""
    with new_pool() as pool:
        with tempfile.TemporaryDirectory() as small:
            write_input(Path(small), 1_000_000, None)
            MeasuredPipeline.over(Path(small), memory_limit, STAGES, pool).made()
        before, gb = pool.submit(settled).result(), size / 1e9
        settled()
        harness.forget_peak()
        values, flow = MeasuredPipeline.over(Path(place), memory_limit, STAGES_OF_CORPUS if corpus else STAGES, pool).made()
    print(f"{gb:g} GB, memory_limit {memory_limit >> 20} MiB above {before:.0f} MiB: {values['shard']:,} documents stay\n")
    driver, tasks = Spent(0, *flow.driver), flow.spent.values()
    harness.head("task", "number", "CPU s per GB", "peak, MiB")
    for kind, spent in flow.spent.items():
        harness.row(kind, spent.tasks, f"{spent.cpu / gb:.1f}", f"{spent.peak - before:.0f}")
    harness.row("the driver", "", f"{driver.cpu / gb:.1f}", f"{driver.peak:.0f}")
    harness.row("all tasks and the driver", "", f"{(sum(one.cpu for one in tasks) + driver.cpu) / gb:.1f}",
                f"{max(one.peak for one in tasks) - before:.0f}")  # fmt: skip
    return values


def compare(memory_limit: int, place: str, corpus: str | None, share: float, complete: dict[str, float]) -> None:
    """Prints a table of the values of the complete run, and of their predictions from a share of the input."""
    with new_pool() as pool:
        one = MeasuredPipeline.over(Path(place), memory_limit, STAGES_OF_CORPUS if corpus else STAGES, pool)
        found = one.foretold(Location(f"{place}/sample-{share:g}"), share)
        took = sum(one._flow.seconds.values()) if one._flow else 0.0
    harness.head("", "complete run", f"predicted from {share:.0%}", "error", "bounds")
    for name, value in complete.items():
        bounds = " to ".join(f"{found[name + end]:,.0f}" for end in BOUNDS) if f"{name}_low" in found else ""
        harness.row(name, f"{value:,.0f}", f"{found[name]:,.0f}", f"{found[name] / value - 1:+.1%}", bounds)
    print(f"\nThe dry run took {took:.0f} CPU s")


def main() -> None:
    asked = harness.arguments(__doc__, gb=[1.0, 4.0], memory_limit=256 << 20, folder={"type": Path}, corpus={"type": Path},
                              sample=0.0, only_input=False)  # fmt: skip
    corpus, values = str(asked.corpus.absolute()) if asked.corpus else None, dict[str, float]()
    for gb in asked.gb:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (asked.folder or Path(temporary)).absolute() / f"{gb:g}"
            write_input(folder, int(gb * 1e9), corpus)
            if not asked.only_input:
                values, _ = harness.apart(measure, int(gb * 1e9), asked.memory_limit, str(folder), corpus)
            if asked.sample and gb == asked.gb[-1] and not asked.only_input:
                harness.apart(compare, asked.memory_limit, str(folder), corpus, asked.sample, values)


if __name__ == "__main__":
    main()
