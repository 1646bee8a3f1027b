"""Tests one run through all faults at once: five changes of the number of workers, three killed workers, a lost node, and a
killed driver."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from heliostat.chaos.nodes import LocalNodes
from heliostat.chaos.process import Command
from heliostat.cluster.processes import end_tree
from heliostat.runs import goodput
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.run import train

from tests.integration.conftest import curve, tiny_job
from tests.integration.hosts import Console
from tests.integration.paced import PACED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 140
UNTIL_S = 150.0


class Here:
    """Represents this machine as a host that can report coming events to the cluster."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def run(self, command: list[str], **options: Any) -> subprocess.Popen:
        return subprocess.Popen(command, env={**os.environ, **self._environment}, **options)


class Ordeal:
    def __init__(self, command: Command, run: Location, nodes: LocalNodes) -> None:
        self.command, self.run, self.nodes = command, run, nodes

    def attempts(self) -> list[tuple[int, str | None]]:
        found = sorted(goodput.read(self.run), key=lambda a: a.started)
        return [(a.workers, a.outcome) for a in found]

    def gets_on(self, steps: int = 7) -> None:
        high = self.command.step
        self.command.until(lambda: self.command.step >= high + steps, UNTIL_S, f"step {high + steps}")

    def has(self, workers: int) -> None:
        """Waits until so many workers train, and have made some steps."""
        self.command.until(lambda: self.attempts()[-1] == (workers, None), UNTIL_S, f"{workers} workers")
        self.gets_on()

    def kill_worker(self) -> None:
        before = len(self.attempts())
        next(node for node in self.nodes.nodes if node.workers()).workers()[0].kill()
        self.command.until(lambda: len(self.attempts()) > before, UNTIL_S, "another attempt")
        self.gets_on()

    def drain(self, console: Console) -> None:
        leaving = next(node for node in self.nodes.nodes if node.workers())
        console.drain(leaving.address, 60)
        self.has(2)
        leaving.kill()
        self.nodes.nodes.remove(leaving)


def test_a_run_resized_five_times_without_three_workers_a_node_and_its_driver_verifies(corpus, tracking, tmp_path: Path):
    job = tiny_job(corpus, tracking, tmp_path)
    job["train"] |= {"steps": STEPS, "global_batch_size": 24, "log_every": 1}
    job["data"]["virtual_ranks"] = 6
    job |= {"evaluate": None, "retries": {"backoff": 0.2}, "watchdog": {"stall": 60, "start": 120}}
    job["checkpoint"] = {"every": 20, "keep": 3, "memory_every": 4}
    whole = tmp_path / "whole.yaml"
    whole.write_text(yaml.safe_dump({**job, "name": "whole", "workers": {"count": 2}, "checkpoint": {"every": 100}}))
    expected = curve(tracking, train(whole)["run_id"])
    path, run = tmp_path / "ordeal.yaml", Location(job["storage"]).join("ordeal")
    elastic = {"workers": {"count": [2, 3], "placement": "strict_spread"}, **PACED}
    path.write_text(yaml.safe_dump({**job, "name": "ordeal", **elastic}))
    with LocalNodes(tmp_path, 3, 3) as nodes, Command([str(path)], tmp_path / "log", nodes.environment) as command:
        console = Console(Here(nodes.environment))  # type: ignore[arg-type]
        ordeal = Ordeal(command, run, nodes)
        command.until(lambda: command.step > 5, UNTIL_S, "the first steps")
        ordeal.kill_worker()
        lost = next(node for node in nodes.nodes if node.workers())
        lost.kill()
        nodes.nodes.remove(lost)
        ordeal.has(2)
        nodes.add()
        ordeal.has(3)
        ordeal.kill_worker()
        ordeal.drain(console)
        nodes.add()
        ordeal.has(3)
        end_tree(command.process)
        command.arguments = [str(path), "--resume"]
        command.start()
        ordeal.has(3)
        ordeal.kill_worker()
        ordeal.drain(console)
        console.close()
        assert command.wait(400) == 0, command.last_words()
        result = command.result()
    attempts = sorted(goodput.read(run), key=lambda a: a.started)
    counts = [a.workers for a in attempts]
    assert sum(a != b for a, b in itertools.pairwise(counts)) == 5, counts
    outcomes = [a.outcome for a in attempts]
    assert outcomes.count("failed") == 4 and outcomes.count("preempted") == 2 and outcomes.count("resize") == 2, outcomes
    assert any(a.start_step % 20 for a in attempts[1:]), "none went on from memory"
    assert curve(tracking, result["run_id"]) == pytest.approx(expected, abs=1e-3)  # other worker counts add up in another order
    report = verify(run)
    assert report["ok"] and report["steps"] == STEPS and report["lost"] == report["repeated"] == 0, json.dumps(report)
