"""Tests the driver's side of a stream without Ray: no task is lost or runs twice, however the stream ends. Tests the wait for
GPUs."""

import logging
import queue
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from heliostat.config.fields import ActorGpus
from heliostat.curation import gpus, streaming
from heliostat.curation.simulation.measuring import MeasuringCluster
from heliostat.curation.streamed import StreamPart, StreamPlan
from heliostat.errors import ConfigError, HeliostatError
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.ray_cluster import RayCluster
from heliostat.tasks.work import Work, key
from pydantic import TypeAdapter, ValidationError

PLAN = StreamPlan(None, [StreamPart("read", 0, []), StreamPart("stages-0", 0, [])], [False, True], [], 1 << 20, True, 1)
RECORD = {"records": [{"kind": "read", "seconds": 1.0, "reasons": {}, "passed": 2}], "runs": [["a", 2, 3]], "files": []}


class LimitedStream:
    """Takes at most three tasks at a time, and loses some. Ends after some tasks, as after the death of a process."""

    drawn = random.Random()
    ends_after = 0
    unfinished: frozenset[int] = frozenset()

    def __init__(self, flow: Flow, plan: StreamPlan) -> None:
        self.waiting: dict[int, Task] = {}
        self.reason, self.count, self.ended = "", 0, False

    def start(self, number: int, task: Task) -> bool:
        if room := len(self.waiting) < 3:
            self.waiting[number] = task
        return room

    def finished(self, wait_s: float) -> Iterator[streaming.Finished]:
        if self.count >= self.ends_after:
            self.reason = "ended"
        if self.waiting and not self.reason:
            self.count += 1
            number = self.drawn.choice(list(self.waiting))
            yield number, self.waiting.pop(number), RECORD

    def rest(self) -> Iterator[streaming.Finished]:
        LimitedStream.unfinished = frozenset(self.waiting)
        yield from ((number, task, None) for number, task in self.waiting.items())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("seed", range(20))
def test_every_task_comes_back_once_wherever_the_stream_ends(tmp_path, monkeypatch, seed):
    """Tasks with a record aren't started. Tasks that recorded tasks have begun are left to them. The stream's log counts all
    other tasks without a record."""
    monkeypatch.setattr(streaming, "RunningStream", LimitedStream)
    monkeypatch.setattr(LimitedStream, "drawn", random.Random(seed))
    monkeypatch.setattr(LimitedStream, "ends_after", seed)
    work = Work(Location(str(tmp_path)))
    tasks = [Task(key(number), {"piece": []}) for number in range(12)]
    work.finish("stream", PLAN.key(tasks[2].key), RECORD)
    work.finish("read", tasks[5].key, RECORD)
    flow = Flow(Work(Location(str(tmp_path))))
    finished = list(streaming.run(flow, PLAN, iter(tasks)))
    assert sorted(number for number, *_ in finished) == list(range(12))
    assert all(tasks[number] is task for number, task, _ in finished)
    records: dict[int, Any] = {number: record for number, _, record in finished}
    assert records[2] == RECORD and records[5] is None and flow.kept == {"read": 1} and flow.passed == 2
    assert LimitedStream.unfinished == {number for number in records if records[number] is None} - {5}


class GpuFlow(Flow):
    """Has a GPU from the given look on."""

    looks, since = 0, 0

    def nodes(self, resource: str = "CPU") -> list[int]:
        self.looks += 1
        return [4] if resource == "GPU" and self.looks > self.since else [0]


@pytest.mark.parametrize(
    ("since", "later", "count", "line"),
    [
        (0, 0, 4, ""),
        (0, 16, 16, ""),
        (3, 16, 16, "waiting up to 9 s for a GPU, because the cluster's autoscaler can add 16"),
        (99, 0, 0, "the cluster has no node with a GPU, so these stages run on CPUs"),
        (99, 2, 0, "no node with a GPU has joined within 9 s, so these stages run on CPUs"),
    ],
)
def test_a_pipeline_waits_for_gpus_that_can_join_and_logs_if_its_stages_run_on_cpus(
    tmp_path, monkeypatch, caplog, since, later, count, line
):
    caplog.set_level(logging.INFO)
    flow, clock = GpuFlow(Work(Location(str(tmp_path)))), [0.0]
    flow.since = since
    monkeypatch.setattr(gpus, "_later", lambda: later)
    requests = list[object]()
    monkeypatch.setattr(gpus, "placement_group", lambda bundles, **more: requests.append(bundles) or len(requests))
    monkeypatch.setattr(gpus, "remove_placement_group", lambda number: requests.pop(number - 1))
    monkeypatch.setattr(gpus.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpus.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    assert gpus.awaited(flow, ["perplexity"], 9.0) == count and not requests
    assert (f"perplexity: {line}" in caplog.text) if line else not caplog.text


def test_actors_without_their_gpus_are_an_error_and_do_not_wait_forever(tmp_path, monkeypatch) -> None:
    flow = GpuFlow(Work(Location(str(tmp_path))))
    flow.since = 99
    monkeypatch.setattr(gpus, "_later", lambda: 0)
    with pytest.raises(ConfigError, match=r"^gpus: an actor needs 0\.5 GPUs, but the nodes have 0\. Set gpus to 0 to compute on"):
        gpus.require(flow, "gpus", 0.5)
    monkeypatch.setattr(gpus, "_later", lambda: 1)
    gpus.require(flow, "gpus", 0.5)
    with pytest.raises(ValidationError, match=r"1\.5 isn't a whole number of GPUs\. Use at most 1, .* such as 2"):
        TypeAdapter(ActorGpus).validate_python(1.5)  # Ray would raise a ValueError after all images are read


def test_the_gpus_of_an_actor_must_be_on_one_node(tmp_path, monkeypatch) -> None:
    flow = Flow(Work(Location(str(tmp_path))))
    monkeypatch.setattr(Flow, "nodes", lambda flow, resource="CPU": [1, 1, 1, 1])
    gpus.require(flow, "gpus", 1.0)
    monkeypatch.setattr(gpus, "_later", lambda: 4)
    with pytest.raises(ConfigError, match=r"^gpus: an actor needs 8 GPUs, but no node has more than 1\. Set gpus to 0"):
        gpus.require(flow, "gpus", 8.0)
    monkeypatch.setattr(gpus, "placement_group", lambda bundles, **more: None)
    monkeypatch.setattr(gpus, "remove_placement_group", lambda group: None)
    with pytest.raises(HeliostatError, match=r"^gpus: no node with 4 GPUs has joined within 0 s\. Run the command again"):
        gpus.taken(flow, SimpleNamespace(gpus_each=4.0), "gpus", print, iter([]), print, 0.0)


def test_a_stream_ends_if_the_rest_of_the_nodes_have_too_few_gpus_for_an_actor(tmp_path, monkeypatch) -> None:
    """A node with two GPUs is lost, and only nodes with one remain. Its actors would wait forever."""
    flow = Flow(Work(Location(str(tmp_path))))
    monkeypatch.setattr(Flow, "nodes", lambda flow, resource="CPU": [1, 1])
    monkeypatch.setattr(streaming.time, "monotonic", lambda: 2 * streaming.PLACE_S)
    for each, reason in ((1.0, ""), (2.0, f"no node with the GPUs of an actor for {streaming.PLACE_S:.0f} s")):
        one = streaming.RunningStream.__new__(streaming.RunningStream)
        vars(one).update(flow=flow, plan=SimpleNamespace(gpus_each=each), reason="", looked=0.0, had_gpus=0.0, writes=deque())
        one.lacking = SimpleNamespace(qsize=lambda: 0, get_nowait_batch=lambda size: [])
        one._look()
        assert one.reason == reason


@pytest.mark.parametrize("since", [0, 3, 99])
def test_tasks_wait_for_the_gpus_of_their_actors_and_never_run_without(tmp_path, monkeypatch, since) -> None:
    """No GPU is late, or one joins late, or none joins in time."""
    flow, clock = GpuFlow(Work(Location(str(tmp_path)))), [0.0]
    flow.since = since
    monkeypatch.setattr(gpus, "_later", lambda: 16)
    monkeypatch.setattr(gpus, "placement_group", lambda bundles, **more: None)
    monkeypatch.setattr(gpus, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(gpus.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpus.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(streaming, "run", lambda flow, plan, tasks: ((n, task, {"n": n}) for n, task in enumerate(tasks)))
    tasks = iter([Task("a", {}), Task("b", {})])
    if since < 99:
        assert gpus.taken(flow, PLAN, "gpus", print, tasks, lambda record: record["n"], 9.0) == [0, 1]
    else:
        with pytest.raises(HeliostatError, match=r"^gpus: no node with a GPU has joined within 9 s\. Run the command again"):
            gpus.taken(flow, PLAN, "gpus", print, tasks, lambda record: record["n"], 9.0)
    assert (clock[0] > 0) is (since > 0)


def test_a_simulation_measures_no_stream(tmp_path) -> None:
    """It would leave out the time of the models without a word."""
    flow = Flow(Work(Location(str(tmp_path))), cluster=MeasuringCluster(RayCluster()))
    with pytest.raises(ConfigError, match=r"^--simulate: read: models in actors aren't supported"):
        list(streaming.run(flow, PLAN, iter([Task("a", {})])))


class NothingLacks:
    """Is the queue of a stream whose nodes lack no files."""

    def qsize(self) -> int:
        return 0

    def get_nowait_batch(self, count: int) -> list[Any]:
        return []


def test_the_error_of_a_file_that_cant_be_copied_ends_the_wait(tmp_path):
    """Workers wait ten minutes for such a file, so the driver raises the error and doesn't wait for them."""
    waiting = object.__new__(streaming.RunningStream)
    waiting.flow, waiting.lacking = GpuFlow(Work(Location(str(tmp_path)))), NothingLacks()
    waiting.received, waiting.looked, waiting.had_gpus = queue.SimpleQueue(), 0.0, 0.0
    waiting.writes = deque([Future()])
    waiting.writes[0].set_exception(ConfigError("models: is a link to a folder"))
    with pytest.raises(ConfigError, match="is a link"):
        list(waiting.finished(0))
