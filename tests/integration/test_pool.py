"""Tests the pool of workers on a real Ray: which processes survive a change of their number, and what the pool holds
meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import ray
from heliostat.config.spec import Workers
from heliostat.errors import PlacementError
from heliostat.training.driver import slots
from heliostat.training.driver.pool import WorkerPool
from ray.util.placement_group import placement_group, remove_placement_group

from tests.waiting import until

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(Workers(count=3)) as made:
        yield made


def pids(pool: WorkerPool, count: int) -> set[int]:
    return {member.pid for member in pool.take(count)}


def become_free(cpus: float, why: str = "") -> None:
    """Waits until so many CPUs are free. Ray reports this with a delay."""
    until(lambda: ray.available_resources().get("CPU", 0.0) == cpus, f"{cpus:g} free CPUs {why}")


def test_survivors_stay_when_their_number_changes_and_the_rest_is_given_back(pool):
    total = ray.cluster_resources()["CPU"]
    three = pids(pool, 3)
    two = pids(pool, 2)
    assert len(two) == 2 and two < three
    become_free(total - 2, "of which the third worker has given back its own")
    again = pids(pool, 3)
    assert len(again) == 3 and two < again
    os.kill(min(again), signal.SIGKILL)
    replaced = pids(pool, 3)
    assert len(replaced) == 3 and again - {min(again)} < replaced
    become_free(total - 3)
    pool.close()
    become_free(total)


def test_workers_that_wait_for_the_rest_hold_nothing_after_a_while(pool, monkeypatch, caplog):
    """The run needs three workers, and there is room for two. First their resources, then the survivors', become free for
    others."""
    monkeypatch.setattr(slots, "PLACE_S", 1.0)
    total = int(ray.cluster_resources()["CPU"])
    two = pids(pool, 2)
    others = placement_group([{"CPU": 1}] * (total - 2))
    ray.get(others.ready())
    with pytest.raises(PlacementError, match="the cluster has room only for 2 of 3 workers"):
        pool.take(3, patient=False)
    become_free(2)
    pids(pool, 2)
    found: list[set[int]] = []
    waits = threading.Thread(target=lambda: found.append(pids(pool, 3)))
    waits.start()
    become_free(2, "of those that wait")
    assert pool.waiting and not found
    remove_placement_group(others)
    waits.join(120)
    assert found and len(found[0]) == 3 and not found[0] & two
    assert "Releasing these resources until there is room for all workers" in caplog.text


def test_two_runs_that_do_not_both_fit_get_on_one_after_the_other(monkeypatch):
    total = int(ray.cluster_resources()["CPU"])
    each = total // 2 + 1
    done: list[int] = []

    def use() -> None:
        with WorkerPool(Workers(count=each)) as made:
            done.append(len(made.take(each)))

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert done == [each, each]


def test_a_node_that_is_avoided_takes_no_workers(pool):
    pool.take(1)
    (node,) = pool.held()
    pool.avoid([node])
    assert not pool.held()
    with pytest.raises(PlacementError):
        threading.Timer(1.5, pool.close).start()
        pool.take(1)
