"""Runs one measurement in a separate process: `python -m tests.benchmarks.ingest_contenders.child TASK`.

It starts everything that would run anyway (consumers with their imports, Ray), prints "ready", and waits for "go". Then it
delivers the dataset and prints what each consumer saw. It runs until it is ended, so that all its processes can be measured.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from tests.benchmarks.ingest_contenders.contenders import CONTENDERS
from tests.benchmarks.ingest_contenders.task import Task, consume

MARK = "@ingest "
DEADLINE_S = 300


def say(event: str, **details: Any) -> None:
    print(f"\n{MARK}{json.dumps({'event': event, **details})}", flush=True)


def hear(expected: str) -> None:
    assert sys.stdin.readline().strip() == expected, f"the parent did not say {expected!r}"


def consumer(text: str, rank: int, pipe: Connection) -> None:
    """Runs a consumer as a plain process."""
    task = Task.parse(text)
    contender = CONTENDERS[task.contender]
    importlib.import_module(contender.needs)
    importlib.import_module("torch.utils.data")
    pipe.send("ready")
    pipe.recv()
    pipe.send(consume(contender.batches(task, rank)))
    pipe.recv()


def receive(pipe: Connection) -> Any:
    assert pipe.poll(DEADLINE_S), "a consumer does not answer"
    return pipe.recv()


def processes(task: Task) -> None:
    context = multiprocessing.get_context("fork")  # nothing heavy is loaded here, and the DataLoaders then fork too
    pipes, started = [], []
    for rank in range(task.consumers):
        mine, theirs = context.Pipe()
        process = context.Process(target=consumer, args=(task.dump(), rank, theirs))
        process.start()
        theirs.close()  # so that a consumer's death ends the wait for it
        pipes.append(mine)
        started.append(process)
    for pipe in pipes:
        receive(pipe)
    say("ready")
    hear("go")
    since = time.monotonic()
    for pipe in pipes:
        pipe.send("go")
    say("done", since=since, consumers=[receive(pipe) for pipe in pipes])
    hear("end")
    for pipe in pipes:
        pipe.send("end")
    for process in started:
        process.join(30)


def actors(task: Task) -> None:
    import ray
    from heliostat.cluster.connect import connect

    connect(cpus=max(multiprocessing.cpu_count(), task.consumers + 2))
    kind: Any = ray.remote(num_cpus=1)(Consumer)
    consumers = [kind.remote(task.dump(), rank) for rank in range(task.consumers)]
    ray.get([c.ready.remote() for c in consumers], timeout=DEADLINE_S)
    import ray.data  # as the consumers' imports: not part of what is measured

    say("ready")
    hear("go")
    since = time.monotonic()
    split = CONTENDERS[task.contender].split
    assert split
    shards = split(task)
    seen = ray.get([c.run.remote(s) for c, s in zip(consumers, shards, strict=True)], timeout=DEADLINE_S)
    say("done", since=since, consumers=seen)
    hear("end")
    ray.shutdown()


class Consumer:
    """Runs a consumer as a Ray actor."""

    def __init__(self, text: str, rank: int) -> None:
        import ray.data  # noqa: F401 (before the start, as the plain processes do)

        self.task, self.rank = Task.parse(text), rank

    def ready(self) -> None: ...

    def run(self, shard: Any) -> dict[str, Any]:
        return consume(CONTENDERS[self.task.contender].batches(self.task, self.rank, shard))


if __name__ == "__main__":
    given = Task.parse(sys.argv[1])
    (actors if CONTENDERS[given.contender].split else processes)(given)
