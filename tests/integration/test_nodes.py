"""Tests a run on three Ray nodes with their own networks, which loses one node after another in every possible way.

Chaos on the same machine can't cut a network. Here each node is a network namespace, and the driver is on the first.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from heliostat.chaos.process import STEP
from heliostat.runs import goodput
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.run import train

from tests.integration import hosts
from tests.integration.conftest import curve, tiny_job
from tests.integration.network import why_not
from tests.waiting import until

STEPS = 300  # some 60 are made while a node starts on a fast machine
TRAIN = [sys.executable, "-c", "from heliostat.cli.main import main; main()", "train"]
WHY = why_not()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY), reason=WHY),
    pytest.mark.timeout(1800),  # minutes, on a machine that is not busy
]


@pytest.fixture
def job(corpus: str, tracking: str, tmp_path: Path) -> dict:
    """Returns a job with six virtual ranks, for one, two, or three workers, each on its own node."""
    made = tiny_job(corpus, tracking, tmp_path)
    made["train"] |= {"steps": STEPS, "global_batch_size": 24, "log_every": 1}
    made["data"]["virtual_ranks"] = 6
    made["evaluate"] = None
    made["checkpoint"] = {"every": 5, "keep": 3}
    made["retries"] = {"backoff": 0.2}
    made["watchdog"] = {"stall": 60, "start": 120}
    return made


class Driver:
    """Runs `heliostat train` on the first host, and follows its output."""

    def __init__(self, host: hosts.Host, path: Path, log: Path) -> None:
        self.log = log
        with log.open("w") as err, (log.parent / "result").open("w") as out:
            self.process = host.run([*TRAIN, str(path), "--json"], stdout=out, stderr=err)

    def text(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        until(condition, what, 150, lambda: self.process.poll() is None, self.text)

    def steps_made(self) -> list[int]:
        return [int(found) for found in STEP.findall(self.text())]

    def gets_on(self, steps: int = 4) -> None:
        """Waits until the run has made new steps from here."""
        high = max(self.steps_made(), default=0)
        self.until(lambda: max(self.steps_made(), default=0) >= high + steps, f"step {high + steps}")


def attempts(run: Location) -> list[tuple[int, str | None]]:
    found = sorted(goodput.read(run), key=lambda a: a.started)
    return [(a.workers, a.outcome) for a in found]


def test_a_run_outlives_a_drained_a_killed_and_a_cut_off_node(job, tracking, tmp_path):
    """One of three nodes is drained with notice, and returns; one is killed; one is disconnected. The curve equals the unbroken
    run's."""
    whole = tmp_path / "whole.yaml"
    whole.write_text(yaml.safe_dump({**job, "name": "whole", "workers": {"count": 1}}))
    expected = curve(tracking, train(whole)["run_id"])
    path, run = tmp_path / "nodes.yaml", Location(job["storage"]).join("nodes")
    path.write_text(yaml.safe_dump({**job, "name": "nodes", "workers": {"count": [1, 3], "placement": "strict_spread"}}))
    with hosts.Hosts(tmp_path, 3) as made:
        first, second, third = made.all
        for host in made.all:
            host.start(cpus=3)
        console = first.console()
        driver = Driver(first, path, tmp_path / "driver.log")
        try:
            driver.gets_on(8)
            console.drain(third.address, 60)
            driver.until(lambda: (2, None) in attempts(run), "an attempt of two workers")
            third.kill()  # its provider takes it
            driver.gets_on()
            third.start(cpus=3)
            driver.until(lambda: attempts(run)[-1] == (3, None), "growth to three workers")
            driver.gets_on()
            second.kill()
            driver.until(lambda: len(attempts(run)) == 4 and attempts(run)[-1][0] == 2, "an attempt behind the kill")
            driver.gets_on()
            third.cut_off()
            assert driver.process.wait(240) == 0, driver.text()[-3000:]
        finally:
            console.close()
            driver.process.kill()
            driver.process.wait()
    result = json.loads((tmp_path / "result").read_text().splitlines()[-1])
    assert curve(tracking, result["run_id"]) == pytest.approx(expected, abs=1e-3)  # other worker counts add up in another order
    report = verify(run)
    assert report["ok"] and report["steps"] == STEPS and report["lost"] == report["repeated"] == 0
    assert attempts(run) == [(3, "preempted"), (2, "resize"), (3, "failed"), (2, "failed"), (1, "finished")]
    drained, grown = sorted(goodput.read(run), key=lambda a: a.started)[:2]
    assert grown.start_step == drained.reached  # notice was enough to lose no step
