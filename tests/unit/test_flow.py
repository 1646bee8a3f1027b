"""Tests how tasks run: what they request from nodes."""

import time

import pytest
import ray
from heliostat.cluster import nodes
from heliostat.storage.locations import Location
from heliostat.tasks import cpu_time, crew, flow
from heliostat.tasks.clusters import TaskKind
from heliostat.tasks.work import Work


def node(cpus: float, alive: bool = True, gpus: float = 0.0, **labels: str) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus} if cpus else {}, "Labels": labels}


@pytest.mark.parametrize(("nodes", "shards", "each"), [
    ([0, 1, 1], 1, 1),  # not 2, which no node has
    ([0, 16, 16, 16, 16], 1, 16),
    ([16, 16, 16, 16], 3, 16),
    ([16, 16, 16, 16], 5, 8),
    ([64, 4], 2, 32),
    ([64, 4], 100, 1),
    ([], 1, 1),
])  # fmt: skip
def test_a_task_of_few_requests_no_more_cpus_than_a_node_has(tmp_path, monkeypatch, nodes, shards, each):
    monkeypatch.setattr(ray, "nodes", lambda: [*map(node, nodes), node(1000, alive=False)])
    assert flow.Flow(Work(Location(str(tmp_path)))).cpus_each(shards) == each


def test_only_living_nodes_that_carry_the_labels_count(tmp_path, monkeypatch):
    there = [node(2, pool="data", gpus=1), node(8, pool="train", gpus=8), node(1, pool="data")]
    there.append(node(64, alive=False, pool="data"))
    monkeypatch.setattr(ray, "nodes", lambda: there)
    mine = flow.Flow(Work(Location(str(tmp_path))), {"pool": "data"})
    assert (mine.cpus(), mine.devices(), mine.cpus_each(1), mine.cpus_each(2)) == (3, 1, 2, 1)


@pytest.mark.parametrize(("selector", "cpus"), [
    ("data", 5), ("!train", 13), ("in(data, train)", 7), ("in(data,train)", 7), ("!in(data, train)", 8), ("!data", 10), ("", 1),
])  # fmt: skip
def test_labels_select_nodes_as_ray_does(tmp_path, monkeypatch, selector, cpus):
    """For `!`, Ray accepts a node without the label, and it reads lists. Every node that Ray would use must count."""
    there = [node(5, pool="data"), node(2, pool="train"), node(8)]
    monkeypatch.setattr(ray, "nodes", lambda: there)
    mine = flow.Flow(Work(Location(str(tmp_path))), {"pool": selector})
    assert mine.cpus() == cpus
    named = {f"{i}": one | {"NodeID": f"{i}"} for i, one in enumerate(there)}
    monkeypatch.setattr(ray, "nodes", lambda: list(named.values()))
    assert max(1, sum(nodes.carrying({"pool": selector}).values())) == cpus


def test_a_cluster_without_a_node_that_carries_the_labels_is_warned_of_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray, "nodes", lambda: [node(8, pool="train")])
    monkeypatch.setattr(crew, "LOOK_S", 0.0)
    made = crew.Crew(flow.Flow(Work(Location(str(tmp_path))), {"pool": "data"}), TaskKind("read", flow.execute, print))
    assert not made.full and not made.full
    assert (
        caplog.text.count(
            "read: tasks wait for a node with CPUs and the labels {'pool': 'data'}. The cluster has no such node now. "
            "Start such a node, or change `labels`"
        )
        == 1
    )


def spin(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass


def test_the_seconds_of_loading_compiled_code_are_a_tasks_opening(tmp_path):
    """A process loads code once, so predictions of a larger input must not multiply these seconds."""

    def task(folder: Location) -> dict[str, object]:
        with cpu_time.loading():
            spin(0.2)
            with cpu_time.loading():  # a compiled function that calls another
                spin(0.2)
        start = cpu_time.now()
        spin(0.05)
        return {"stage": cpu_time.now() - start, "opening": 0.5}

    record = flow.execute(Work(Location(str(tmp_path))), "run", "kind", "key", task, {})
    assert 0.9 <= record["opening"] < 1.1 and record["seconds"] >= 0.45 and 0.05 <= record["stage"] < 0.2
