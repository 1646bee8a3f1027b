"""Strikes `prepare` at random moments: kills its driver, a worker, a node, or all of it, fills its disk, or breaks its store.

    python -m tests.benchmarks.prepare_chaos [--kinds driver machine worker node disk s3] [--rounds 4] [--seed 0]

A round prepares the same input, meets faults, and is started again until it finishes:

    driver    SIGKILL to the command alone, up to three times
    machine   SIGKILL to the command and all its processes at once, up to three times
    worker    SIGKILL to a process that runs a task, up to three times; the run continues by itself
    node      the cluster has two nodes (raylets on loopback addresses); a whole node is killed, and another joins
    disk      output and work are on a disk that is full after a random share, and gets half as much more at each start
    s3        output and work are on a store that rejects 2 to 30 % of all requests

A fault strikes up to half a second after a task, drawn from an unbroken run's tasks. Prints a row per kind: rounds, those with
the digest of an unbroken run, faults, starts, tasks recorded at a fault or at the end of a start, and the number of their records
that changed later, because their tasks ran again. After an orderly end (a full disk, a store that fails for long), shards and the
files next to them don't count, because the run removes them. Disks need root.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from heliostat.chaos import faults
from heliostat.chaos.nodes import LocalNodes
from heliostat.chaos.proxy import FaultProxy, ProxyFault
from heliostat.chaos.servers import ServerProcess, s3_server
from heliostat.storage.locations import Location

from tests import stores
from tests.benchmarks import harness
from tests.benchmarks.broken.rounds import Round, at_work
from tests.unit.build_curation import spelled

KILLS = 3  # of a round
PUBLISHED = ("shards", "listed", "ends")


def make_input(folder: Path, documents: int) -> None:
    """Writes JSON lines: a seventh are near-duplicates, and an eleventh exact ones."""
    folder.mkdir()
    rng, texts = random.Random(0), list[str]()
    for part in range(8):
        with (folder / f"{part}.jsonl").open("w") as f:
            for i in range(documents // 8):
                text = " ".join(f"w{spelled(rng.randrange(3000))}" for _ in range(60 + rng.randrange(90)))
                text = f"{rng.choice(texts)} more" if texts and i % 7 == 3 else text
                text = rng.choice(texts) if texts and i % 11 == 5 else text
                texts.append(text)
                f.write(json.dumps({"text": text}) + "\n")


def prepare(folder: Path, pipeline: dict[str, object], rng: random.Random, tasks: int = 0,
            environment: dict[str, str] | None = None, done: str | None = None) -> Round:  # fmt: skip
    """Creates the round that prepares a dataset in a new folder."""
    folder.mkdir()
    config = {"output": str(folder / "out"), "work": str(folder / "work"), **pipeline}
    (folder / "pipeline.yaml").write_text(json.dumps(config))
    place = Location(done or str(config["work"])).join("done")
    return Round(folder, ["data", "prepare", str(folder / "pipeline.yaml")], place, rng, tasks, environment, PUBLISHED)


def kill(round: Round, everything: bool) -> None:
    """Kills the command at random moments, or all of its processes, and starts it again."""
    while not round.over:
        run = round.start()
        struck = round.starts <= KILLS and round.until(run)
        if struck:
            round.kill(run, at_work([run.pid]), everything)
        round.struck += struck
        round.end(run, in_order=not struck)


def kill_workers(round: Round) -> None:
    while not round.over:
        run = round.start()
        for _ in range(KILLS):
            round.struck += round.until(run) and round.kill_worker(run, [run.pid])
        round.end(run, in_order=True)


def kill_nodes(round: Round, nodes: LocalNodes) -> None:
    while not round.over:
        run = round.start()
        if round.until(run):
            round.kill_node(nodes)
            round.struck += 1
        round.end(run, in_order=True)


def fill_disk(round: Round, place: Path, size: int) -> None:
    held = int(size * round.rng.uniform(0.05, 0.9))
    faults.mount_disk(place, held)
    try:
        while not round.over:
            round.end(round.start(), in_order=True)
            round.struck += round.result is None
            held += size // 2
            subprocess.run(["mount", "-o", f"remount,size={held}", str(place)], check=True)
    finally:
        faults.unmount_disk(place)


def digest(round: Round) -> str | None:
    """Returns the digest of the dataset, if one was made."""
    return round.result and round.result["digest"]


class Bench:
    """Holds the common parts of rounds: the input, an S3 server, and an unbroken run."""

    def __init__(self, folder: Path, store: ServerProcess, documents: int) -> None:
        self.folder, self.store = folder, store
        make_input(folder / "in", documents)
        stores.bucket(store.endpoint, "chaos")
        self.pipeline: dict[str, object] = {
            "name": "chaos", "pipeline": "heliostat.pipelines:TextPipeline", "input": str(folder / "in"), "keep_work": True,
            "tokenizer": {"vocab_size": 400, "train_bytes": 20_000}, "stages": [{"stage": "minhash"}],
            "chunk_tokens": 4000, "shard_bytes": documents * 20,
        }  # fmt: skip
        whole, start = prepare(folder / "whole", self.pipeline, random.Random(0)), time.monotonic()
        whole.end(whole.start(), in_order=True)
        self.digest, self.tasks = digest(whole), whole.finished
        self.size = sum(p.stat().st_blocks * 512 for p in whole.folder.rglob("*") if p.is_file())
        print(
            f"an unbroken run: {time.monotonic() - start:.1f} s, {self.tasks} tasks, {self.size >> 20} MiB, digest {self.digest}"
        )
        if self.digest is None:
            sys.exit((whole.folder / "log").read_text()[-3000:])

    def round(self, kind: str, number: int, seed: int, nodes: LocalNodes | None) -> tuple[Round, int]:
        """Runs one round; returns it, and the number of faults that struck."""
        rng, folder = random.Random(f"{seed} {kind} {number}"), self.folder / f"{kind}-{number}"
        if kind == "s3":
            return self._over_s3(rng, folder)
        if kind == "disk":
            place = folder.with_suffix(".disk")
            place.mkdir()
            round = prepare(folder, self.pipeline | {"output": f"{place}/out", "work": f"{place}/work"}, rng, self.tasks,
                            {"HELIOSTAT_RETRY_BUDGET_S": "2"})  # fmt: skip
            fill_disk(round, place, self.size)
            return round, round.struck
        round = prepare(folder, self.pipeline, rng, self.tasks, nodes.environment if nodes else None)
        acts: dict[str, Callable[[], None]] = {
            "driver": lambda: kill(round, False), "machine": lambda: kill(round, True), "worker": lambda: kill_workers(round),
            "node": lambda: kill_nodes(round, nodes) if nodes else None,
        }  # fmt: skip
        acts[kind]()
        return round, round.struck

    def _over_s3(self, rng: random.Random, folder: Path) -> tuple[Round, int]:
        with FaultProxy(
            self.store.endpoint, [ProxyFault("status", rate=rng.uniform(0.02, 0.3))], rng.randrange(1 << 30)
        ) as proxy:
            at, query = f"s3://chaos/{folder.name}", f"endpoint_override={proxy.endpoint}&scheme=http"
            given = self.pipeline | {"output": f"{at}/out?{query}", "work": f"{at}/work?{query}"}
            there = f"{at}/work?endpoint_override={self.store.endpoint}&scheme=http"
            round = prepare(folder, given, rng, self.tasks, done=there)
            while not round.over:
                round.end(round.start(), in_order=True)
            return round, sum(proxy.injected.values())


def main() -> None:
    kinds = ["driver", "machine", "worker", "node", "disk", "s3"]
    given = harness.arguments(__doc__, kinds=kinds, rounds=4, first=0, seed=0, documents=4000)
    os.environ.update(stores.AWS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that disks and clusters end with it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, s3_server(Path(name)) as store:
        bench = Bench(Path(name), store, given.documents)
        rows = {kind: Counter[str]() for kind in given.kinds}
        for kind, row in rows.items():
            with contextlib.ExitStack() as stack:
                nodes = stack.enter_context(LocalNodes(Path(name), 2, 2)) if kind == "node" else None
                for number in range(given.first, given.first + given.rounds):
                    start = time.monotonic()
                    round, struck = bench.round(kind, number, given.seed, nodes)
                    same = digest(round) == bench.digest
                    row.update(
                        rounds=1, same=same, struck=struck, starts=round.starts, finished=round.finished, again=round.again
                    )
                    print(f"{kind} {number}: {struck} faults, {round.starts} starts, same digest: {same}, done again: "
                          f"{round.again} of {round.finished}, {time.monotonic() - start:.0f} s", flush=True)  # fmt: skip
                    if not same:
                        print((round.folder / "log").read_text()[-3000:], flush=True)
    harness.head("fault", "rounds", "same digest", "faults", "starts", "tasks recorded", "of these done again")
    for kind, row in rows.items():
        harness.row(kind, *(f"{row[name]:,}" for name in ("rounds", "same", "struck", "starts", "finished", "again")))


if __name__ == "__main__":
    main()
