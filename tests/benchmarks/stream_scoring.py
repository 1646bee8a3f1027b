"""Compares a stream, in which a GPU scores while CPUs read, with recorded tasks that score after all reading has ended.

    python -m tests.benchmarks.stream_scoring [--rounds 3] [--files 16] [--mb 1]

Ray has two nodes with a CPU each. For the stream, one node also has a GPU that the machine doesn't have, so the model runs on a
CPU in both ways, and the difference of the CPU seconds is the stream's own cost. In the third way, a third node also has such a
GPU, and is killed as soon as the stream has finished two tasks. The seconds are of all processes of the cluster and of the
command.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from heliostat.chaos.nodes import LocalNodes

from tests.benchmarks import harness
from tests.unit.build_model import make_model

SAMPLE_S = 0.2


class Prepared(NamedTuple):
    """Holds a run's digest, its CPU and wall-clock seconds, the spans of the stream's parts (kind, begin, end), and the numbers
    of reading tasks that the stream and recorded tasks finished."""

    digest: str
    cpu: float
    wall: float
    spans: list[tuple[str, float, float]]
    finished: tuple[int, int]


def make_input(folder: Path, files: int, mb: float) -> None:
    """Writes a tiny model, and JSON lines whose documents are words of letters."""
    make_model(folder / "model")
    (folder / "in").mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randrange(2, 9))) for _ in range(20_000)]
    for number in range(files):
        with (folder / "in" / f"{number:03}.jsonl").open("w") as out:
            size = 0
            while size < mb * 1e6:
                line = json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(100, 1200)))})
                size += out.write(line + "\n")


class CpuSeconds:
    """Sums the CPU seconds of processes and their descendants, which it looks at every SAMPLE_S seconds."""

    def __init__(self) -> None:
        self.roots, self.seconds, self.ended = list[int](), dict[tuple[int, float], float](), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuSeconds:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def _watch(self) -> None:
        while not self.ended.wait(SAMPLE_S):
            for root in self.roots:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            times = process.cpu_times()
                            self.seconds[process.pid, process.create_time()] = times.user + times.system


def prepare(folder: Path, source: Path, gpus: int, killed: bool = False) -> Prepared:
    """Prepares the input on a new cluster of two nodes. `killed`: with a third node, which is killed in the middle."""
    folder.mkdir()
    score = {"stage": "hf_classifier", "model": str(source / "model"), "label": "good", "max_tokens": 64, "batch": 16}
    stages: list[dict[str, Any]] = [{"stage": "fix_text"}, {"stage": "detect_secrets"}, score | {"min_score": 0.1},
                                    {"stage": "length", "min_words": 100}]  # fmt: skip
    pipeline = {"name": "stream", "pipeline": "heliostat.pipelines:TextPipeline", "input": str(source / "in"),
                "output": str(folder / "out"), "stages": stages, "tokenizer": {"vocab_size": 300, "train_bytes": 50_000},
                "memory_limit": 64 << 20, "shard_bytes": 2 << 20, "keep_work": True}  # fmt: skip
    (folder / "pipeline.yaml").write_text(json.dumps(pipeline))
    with CpuSeconds() as cpu, LocalNodes(folder, 1, 1) as nodes:
        for _ in range(1 + killed):
            nodes.add(gpus=gpus)
        idle, start = cpu.total, time.monotonic()
        command = [sys.executable, "-m", "heliostat", "data", "prepare", str(folder / "pipeline.yaml"), "--json"]
        with (folder / "log").open("w") as log:
            environment = os.environ | nodes.environment
            run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, cwd=harness.ROOT)
            cpu.roots = [run.pid, *(node.process.pid for node in nodes.nodes)]
            while killed and run.poll() is None:
                if len(_records(folder, "stream")) >= 2:
                    nodes.nodes.pop().kill()
                    break
                time.sleep(0.05)
            out, _ = run.communicate()
        wall = time.monotonic() - start
    if run.returncode:
        sys.exit((folder / "log").read_text()[-3000:])
    records, others = (_records(folder, kind) for kind in ("stream", "read"))
    spans = sorted((part["kind"], *part["span"]) for path in records for part in json.loads(path.read_text())["records"])
    digest = json.loads(out.splitlines()[-1])["digest"]
    return Prepared(digest, cpu.total - idle, wall, spans, (len(records), len(others)))


def _records(folder: Path, kind: str) -> list[Path]:
    """Lists the records of the finished tasks of a kind."""
    return list((folder / "out.work/done" / kind).glob("*.json"))


def overlap(spans: list[tuple[str, float, float]]) -> float:
    """Returns the share of the reading's wall-clock time, from its first begin to its last end, during which the GPU scores."""
    reading, scoring = [[(b, e) for kind, b, e in spans if kind == name] for name in ("read", "stages-2")]
    first, last = min(b for b, _ in reading), max(e for _, e in reading)
    return sum(max(0.0, min(e, last) - max(b, first)) for b, e in scoring) / (last - first)


def main() -> None:
    options = harness.arguments(__doc__, rounds=3, files=16, mb=1.0)
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), iter(range(1000))
        make_input(folder, options.files, options.mb)
        ways = {what: lambda keys=keys: prepare(folder / f"{next(runs)}", folder, *keys) for what, keys in
                (("recorded tasks", [0]), ("stream", [1]), ("stream, a node killed", [1, True]))}  # fmt: skip
        results = harness.by_turns(ways, options.rounds)
    if len({one.digest for some in results.values() for one in some}) != 1:
        sys.exit("the digests differ")
    harness.head("way", "CPU seconds", "wall-clock seconds", "GPU busy while CPUs read", "tasks of the stream, recorded tasks")
    for what, some in results.items():
        shares = [overlap(one.spans) for one in some if one.spans]
        harness.row(what, harness.spread([one.cpu for one in some], ".1f"), harness.spread([one.wall for one in some], ".1f"),
                    harness.spread([100 * share for share in shares], ".0f") + " %" if shares else "never",
                    *(one.finished for one in some))  # fmt: skip


if __name__ == "__main__":
    main()
