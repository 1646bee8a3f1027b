"""Tests runs that resume from in-memory checkpoints: at a step without a checkpoint in storage, as if there had been no
failure."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import ray
from heliostat.config.spec import Workers
from heliostat.runs import goodput
from heliostat.runs.verify import verify
from heliostat.storage.locations import Location
from heliostat.training.driver.memory import Memory
from heliostat.training.driver.pool import WorkerPool
from heliostat.training.memory_keeper import CopyFacts, summed
from heliostat.training.run import train

from tests.integration.conftest import curve
from tests.integration.paced import PACED_PLAIN, PLAIN
from tests.integration.strikes import STEPS, actors, kill, run_folder, settings, when, workers
from tests.unit.build_job import job

pytestmark = pytest.mark.usefixtures("ray_session")


def reached(folder: Location) -> int:
    """Returns the step that a run has reached, by its ledger."""
    try:
        return max((a.reached for a in goodput.read(folder)), default=0)
    except Exception:  # noqa: BLE001 (a file that is just being written)
        return 0


@pytest.mark.ci
def test_a_killed_worker_costs_no_more_steps_than_between_two_copies_in_memory(job_file, tracking, unbroken, monkeypatch):
    """Two kills follow the last checkpoint. The second one also kills the keeper of the copies, so storage is used."""
    monkeypatch.setattr("heliostat.runs.time_ledger.EVERY_S", 0.1)
    path = job_file("remembered")
    folder = run_folder(path)
    strike = when((lambda: reached(folder) >= 27, lambda: kill(*workers()[-1:])),
                  (lambda: reached(folder) >= 48, lambda: kill(*actors("MemoryKeeper"), *workers()[-1:])))  # fmt: skip
    result = train(path, settings(**PACED_PLAIN, **{"checkpoint.every": 20, "checkpoint.memory_every": 3}))
    strike.join(10)
    assert result["restarts"] == 2 and result["steps"] == STEPS
    assert curve(tracking, result["run_id"]) == unbroken[1], "to the last bit"
    report = verify(folder)
    assert report["ok"] and report["steps"] == STEPS and report["lost"] == report["repeated"] == 0
    first, second, third = goodput.read_report(folder)["attempts"]
    assert second["start_step"] % 3 == 0 and second["start_step"] > 20
    assert 0 <= first["reached"] - second["start_step"] <= 3 + 1  # the copy of the last multiple may be on its way
    assert third["start_step"] == 40, "its copies were gone, so storage was used"


def test_a_limit_that_is_too_small_is_said_and_nothing_is_kept(job_file, caplog):
    path = job_file("forgetful")
    made = {**PLAIN, "train.steps": 6, "checkpoint.every": 6, "evaluate.every": 6, "checkpoint.memory_every": 2}
    result = train(path, [f"{k}={json.dumps(v)}" for k, v in {**made, "checkpoint.memory_limit": "100KiB"}.items()])
    assert result["steps"] == 6
    text = next(r.getMessage() for r in caplog.records if "memory_every" in r.getMessage())
    need = re.search(
        r"in-memory checkpoints are off: copies need (\d+\.\d) MiB on a node, and .*memory_limit is 0.1 MiB\. Raise", text
    )
    assert need, text
    assert 3 < float(need[1]) < 10, "two generations of 3 x 4 bytes for each of some 170,000 parameters"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    with WorkerPool(Workers(count=2)) as pool, Memory(job(**{"checkpoint.memory_every": 1})) as made:
        yield made, made.plan(1, pool.take(2), None)


def keep(plan: Any, step: int, rank: int, seal: bool = True) -> None:
    data, id = np.full(1000, rank, np.uint8), f"{plan.attempt}:{step}"
    facts = CopyFacts(step, 2, "plan", {"optimizer_steps": step})
    for keeper in plan.keepers[rank]:
        ray.get(keeper.open.remote(id, rank, 1000))  # first: a keeper answers several calls at the same time
        ray.get(keeper.write.remote(id, rank, 0, data))
        if seal:
            ray.get(keeper.seal.remote(id, rank, [summed(data, 0)], facts, [], b""))


def test_a_torn_or_a_damaged_generation_is_not_used(memory, caplog):
    made, plan = memory
    for step, complete in ((10, True), (20, False)):
        keep(plan, step, 0)
        keep(plan, step, 1, seal=complete)
    found = made.newest(1, 5, "plan")
    assert found and (found.step, found.world) == (10, 2), "the one of step 20 is torn"
    assert made.newest(1, 5, "another") is None, "the run's samples have changed"
    assert made.newest(1, 11, "plan") is None, "storage is newer"
    keeper = plan.keepers[1][0]
    ray.get(keeper.write.remote(f"{plan.attempt}:10", 1, 500, np.array([7], np.uint8)))
    assert made.newest(1, 5, "plan") is None
    assert "step 10: the in-memory checkpoint of worker 1 is damaged (checksum)" in caplog.text
    ray.kill(keeper)
    assert made.newest(1, 5, "plan") is None
