"""Tests calls of several tasks, and backups of late calls: each task has one record, and a slow or dead process costs little."""

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
from heliostat.storage.locations import Location
from heliostat.storage.retries import Backoff
from heliostat.tasks import calls, care, crew, dispatchers, ray_cluster, ray_tasks
from heliostat.tasks.calls import Call, CallSlots, CallTimes, Started, copied
from heliostat.tasks.clusters import TaskKind
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.work import Work

from tests.unit.build_ray import ForkedRay

pytestmark = pytest.mark.ci


@pytest.fixture
def forked(monkeypatch) -> ForkedRay:
    made = ForkedRay([1, 1])
    for module in (ray_cluster, ray_tasks):
        monkeypatch.setattr(module, "ray", made)
    monkeypatch.setattr(crew, "PAUSE", Backoff(0.01, 0.01))
    monkeypatch.setattr(calls, "LATE_S", 60.0)  # on a busy machine, a short call may take seconds
    return made


def flow_in(folder: Path) -> Flow:
    return Flow(Work(Location(str(folder / "work"))))


def note(folder: Location, number: int, ran: str, deadly: int = -1, wrong: int = -1) -> dict[str, object]:
    """Marks that a task ran. The process dies at the first run of the task `deadly`."""
    with Path(ran, str(number)).open("a") as file:
        file.write("x")
    if number == deadly and Path(ran, str(number)).stat().st_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == wrong and Path(ran, str(number)).stat().st_size == 1:
        raise ValueError("not now")
    return {"number": number}


def noted(tmp_path: Path, count: int, **fault: int) -> tuple[Flow, list[int], Counter[int]]:
    flow, ran = flow_in(tmp_path), tmp_path / "ran"
    ran.mkdir()
    tasks = (Task(f"{n:032}", {"number": n, "ran": str(ran), **fault}) for n in range(count))
    records = flow.all("some", note, tasks)
    return flow, [record["number"] for record in records], Counter({int(p.name): p.stat().st_size for p in ran.iterdir()})


def test_short_tasks_share_calls_and_each_has_its_record(tmp_path, forked):
    flow, numbers, ran = noted(tmp_path, 200)
    assert numbers == list(range(200)) and flow.done == {"some": 200} and set(ran.values()) == {1}
    assert forked.started == [f"{n:032}" for n in range(200)] and len(forked.asked) < 100
    assert len(flow_in(tmp_path).work.found("some", forked.started)) == 200


def name_of(folder: Location, number: int, of: list[int]) -> dict[str, object]:
    return {"number": number, "of": of}


def test_tasks_with_the_same_shared_arguments_share_calls_in_any_order(tmp_path, forked):
    """The largest tasks start first, so tasks that read the same files don't follow each other. At 100 TB, 95,000 short tasks
    were as many calls, which the driver starts in 99 s."""
    lists = [[n] for n in range(7)]
    tasks = (Task(f"{n:032}", {"number": n}, {"of": lists[n % 7]}) for n in range(350))
    with flow_in(tmp_path) as flow:
        records = flow.all("some", name_of, tasks)
    assert [(r["number"], r["of"]) for r in records] == [(n, [n % 7]) for n in range(350)] and flow.done == {"some": 350}
    assert sorted(forked.started) == [f"{n:032}" for n in range(350)] and len(forked.asked) < 150


@pytest.mark.parametrize("fault", [{"deadly": 150}, {"wrong": 150}])
def test_a_call_that_fails_in_the_middle_repeats_only_the_task_that_failed(tmp_path, forked, fault):
    _, numbers, ran = noted(tmp_path, 200, **fault)
    assert numbers == list(range(200)) and ran.pop(150) == 2 and set(ran.values()) == {1}


def wait_for(folder: Location, number: int, mark: str) -> dict[str, object]:
    """Waits for another kind of task. The process dies at the first run of task 1."""
    own = Path(f"{mark}-{number}")
    own.write_text(f"{own.read_text()}x" if own.exists() else "x")
    if number == 1 and own.read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    while not Path(mark).exists():
        time.sleep(0.01)
    return {"number": number}


def test_tasks_that_start_ahead_run_at_the_same_time_as_the_next_ones(tmp_path, forked):
    """A tokenizer trains while files are merged. The records are in the tasks' order. A task whose process dies runs again."""
    forked.cpus, mark = [4], tmp_path / "mark"
    with flow_in(tmp_path) as flow:
        records = flow.ahead("first", wait_for, (Task(f"{n:032}", {"number": n, "mark": str(mark)}) for n in range(3)))
        assert [record["number"] for record in flow.all("second", slow_for, iter([Task("s" * 32, {"number": 0})]))] == [0]
        mark.write_text("")
        assert [record["number"] for record in records()] == [0, 1, 2] and flow.done == {"first": 3, "second": 1}
        assert Path(f"{mark}-1").read_text() == "xx"
    with flow_in(tmp_path) as flow:  # records of an earlier run count
        again = flow.ahead("first", wait_for, (Task(f"{n:032}", {"number": n, "mark": str(mark)}) for n in range(3)))
        assert [record["number"] for record in again()] == [0, 1, 2] and flow.kept == {"first": 3} and not flow.done


@pytest.mark.parametrize("most", [0, 3])
def test_tasks_that_start_ahead_end_with_the_flow_if_an_error_prevents_their_use(tmp_path, forked, monkeypatch, most):
    """After the error is reported, nothing writes to the work folder, though the error's traceback still refers to the tasks.
    Otherwise the next run in the same process shares its CPUs with them, and Ray starts again if they end after Ray."""
    monkeypatch.setattr(ray_tasks, "ENDING_S", 0.1)
    forked.cpus, mark = [4], tmp_path / "mark"
    tasks = (Task(f"{n:032}", {"number": n, "mark": str(mark)}) for n in [0, *range(2, 2 + most)])
    with pytest.raises(ValueError, match="the merge failed") as error, flow_in(tmp_path) as flow:
        records = flow.ahead("first", wait_for, tasks)
        raise ValueError("the merge failed")
    mark.write_text("")
    time.sleep(0.3)
    assert error.tb and records and not [*(tmp_path / "work").rglob("*.json")]


def slow_once(folder: Location, number: int, slow: str) -> dict[str, object]:
    if number == 3:
        mark = Path(slow)
        if not mark.exists():
            mark.write_text("")
            time.sleep(60)
    return {"number": number}


def test_a_late_call_gets_a_backup_and_the_flow_ends_the_late_one(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(calls, "LATE_S", 0.5)
    monkeypatch.setattr(crew, "LATE_LOOK_S", 0.05)
    monkeypatch.setattr(ray_tasks, "ENDING_S", 0.1)
    start, slow = time.monotonic(), tmp_path / "slow"
    with flow_in(tmp_path) as flow:
        records = flow.all("some", slow_once, (Task(f"{n:032}", {"number": n, "slow": str(slow)}) for n in range(12)))
        assert [record["number"] for record in records] == list(range(12)) and flow.done == {"some": 12}
        ((_, late),) = flow.repeated
        assert not late.ready()
    assert not flow.repeated and late.ready() and time.monotonic() - start < 30
    assert [asked.get("scheduling_strategy") for asked in forked.asked] == [None] * 12 + ["SPREAD"]


def slow_call(folder: Location, number: int, ran: str) -> dict[str, object]:
    """The call that runs task 19 first waits there, and each task marks that it ran."""
    path = Path(ran, str(number))
    with path.open("a") as file:
        file.write("x")
    time.sleep(60 if number == 19 and path.stat().st_size == 1 else 0)
    return {"number": number}


def test_the_tasks_of_a_late_call_run_at_the_same_time_in_its_copies(tmp_path, forked, monkeypatch):
    """The late call has several tasks. Each has a record, from a call of its own, and the records that the late call wrote before
    it was late count. No task is lost, and none is in the result twice."""
    monkeypatch.setattr(calls, "LATE_S", 0.5)
    monkeypatch.setattr(crew, "LATE_LOOK_S", 0.05)
    monkeypatch.setattr(ray_tasks, "ENDING_S", 0.1)
    monkeypatch.setattr(calls.CallTimes, "has_room", lambda times, group, *_: len(group) < 3)
    forked.cpus, ran = [8, 8], tmp_path / "ran"
    ran.mkdir()
    with flow_in(tmp_path) as flow:
        tasks = (Task(f"{n:032}", {"number": n, "ran": str(ran)}) for n in range(24))
        numbers = [number for number, _ in flow.run("some", slow_call, tasks)]
        assert sorted(numbers) == list(range(24)) and flow.done == {"some": 24}
    sent = [started for started in forked.started if forked.started.count(started) > 1]
    assert {int(key) for key in sent} == {18, 19, 20} and sent.count(f"{19:032}") <= 1 + calls.COPIES
    assert [asked.get("scheduling_strategy") for asked in forked.asked[:11]] == [None] * 8 + ["SPREAD"] * 3
    assert (ran / "18").stat().st_size == 1, "it had a record"


def slow_twice(folder: Location, number: int, slow: str) -> dict[str, object]:
    if number == 3:
        with Path(slow).open("a") as file:
            file.write("x")
        time.sleep(60 if Path(slow).stat().st_size < 3 else 0)
    return {"number": number}


def test_a_late_backup_gets_a_backup_too(tmp_path, forked, monkeypatch):
    """Of many backups, one is on a slow node too. The other tasks don't wait for it. Two backups are enough."""
    monkeypatch.setattr(calls, "LATE_S", 0.5)
    monkeypatch.setattr(crew, "LATE_LOOK_S", 0.05)
    monkeypatch.setattr(ray_tasks, "ENDING_S", 0.1)
    forked.cpus, start, slow = [2, 2], time.monotonic(), tmp_path / "slow"
    with flow_in(tmp_path) as flow:
        records = flow.all("some", slow_twice, (Task(f"{n:032}", {"number": n, "slow": str(slow)}) for n in range(18)))
        assert [record["number"] for record in records] == list(range(18)) and len(flow.repeated) == 2
    assert slow.read_text() == "xxx" and time.monotonic() - start < 30


def slow_and_lost(folder: Location, number: int, starts: str) -> dict[str, object]:
    """A slow task whose first copy is lost with its node."""
    if number == 3:
        with Path(starts).open("a") as file:
            file.write("x")
        if (start := Path(starts).stat().st_size) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60 if start == 1 else 0)
    return {"number": number}


def test_a_late_task_gets_another_copy_if_a_copy_is_lost(tmp_path, forked, monkeypatch):
    """In a simulation of 500 nodes, a node was lost with copies, and the step then waited minutes for the slow originals."""
    monkeypatch.setattr(calls, "LATE_S", 0.5)
    monkeypatch.setattr(crew, "LATE_LOOK_S", 1.0)  # the copy is lost before the next look
    monkeypatch.setattr(ray_tasks, "ENDING_S", 0.1)
    forked.cpus, start, starts = [2, 2], time.monotonic(), tmp_path / "starts"
    with flow_in(tmp_path) as flow:
        records = flow.all("some", slow_and_lost, (Task(f"{n:032}", {"number": n, "starts": str(starts)}) for n in range(18)))
        assert [record["number"] for record in records] == list(range(18))
    assert starts.read_text() == "xxx" and time.monotonic() - start < 30


def test_a_task_that_was_lost_with_its_node_may_have_copies(tmp_path):
    """Its record is the same from any copy. Only tasks that leave out documents write notes about their failures."""
    lost = care.Trouble(count=1)
    assert calls.Started(0, Task("a", {}), trouble=lost).can_repeat(1)
    assert not calls.Started(0, Task("a", {}, careful=True), trouble=lost).can_repeat(1)


def test_a_late_call_on_the_only_node_gets_no_backup(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(calls, "LATE_S", 0.1)
    monkeypatch.setattr(crew, "LATE_LOOK_S", 0.05)
    forked.cpus = [2]
    with flow_in(tmp_path) as flow:
        flow.all("some", slow_for, (Task(f"{n:032}", {"number": n}) for n in range(12)))
    assert len(forked.asked) == 12


def slow_for(folder: Location, number: int) -> dict[str, object]:
    time.sleep(1.0 if number == 11 else 0)
    return {"number": number}


def die_or_wait(folder: Location, number: int, slow: str) -> dict[str, object]:
    """The first call with task 3 waits and then dies, and its backup dies at once."""
    if number == 3:
        starts = Path(slow)
        with starts.open("a") as file:
            file.write("x")
        if starts.stat().st_size == 1:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        if starts.stat().st_size == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"number": number}


def test_a_task_runs_again_when_both_of_its_calls_have_died(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(calls, "LATE_S", 0.3)
    monkeypatch.setattr(crew, "LATE_LOOK_S", 0.05)
    with flow_in(tmp_path) as flow:
        records = flow.all("some", die_or_wait, (Task(f"{n:032}", {"number": n, "slow": str(tmp_path / "s")}) for n in range(12)))
    assert [record["number"] for record in records] == list(range(12)) and (tmp_path / "s").read_text() == "xxx"


def wait_or_fail(folder: Location, number: int, slow: str) -> dict[str, object]:
    """The first call with task 3 takes a while, and each other call with it fails at once."""
    if number == 3:
        with Path(slow).open("a") as file:
            file.write("x")
        if Path(slow).stat().st_size > 1:
            raise ValueError("not here")
        time.sleep(3)
    return {"number": number}


def test_a_backup_that_fails_is_not_started_again(tmp_path, forked, monkeypatch):
    monkeypatch.setattr(calls, "LATE_S", 0.3)
    monkeypatch.setattr(crew, "LATE_LOOK_S", 0.05)
    with flow_in(tmp_path) as flow:
        records = flow.all(
            "some", wait_or_fail, (Task(f"{n:032}", {"number": n, "slow": str(tmp_path / "s")}) for n in range(12))
        )
    assert [record["number"] for record in records] == list(range(12)) and (tmp_path / "s").read_text() == "xx"


def wait_twice(folder: Location, number: int, slow: str) -> dict[str, object]:
    if number == 3:
        with Path(slow).open("a") as file:
            file.write("x")
        time.sleep(60 if Path(slow).stat().st_size < 3 else 0)
    return {"number": number}


def test_a_call_and_its_backup_start_again_once_on_smaller_nodes(tmp_path, forked, monkeypatch):
    """The nodes are replaced by nodes with fewer CPUs while both calls run. Each task still counts once."""
    for module, name, seconds in ((calls, "LATE_S", 0.3), (crew, "LATE_LOOK_S", 0.05), (crew, "LOOK_S", 0.1)):
        monkeypatch.setattr(module, name, seconds)
    nodes = forked.nodes

    def replaced() -> list[dict[str, object]]:
        forked.cpus = [1, 1] if any(asked.get("scheduling_strategy") for asked in forked.asked) else [2, 2]
        return nodes()

    forked.nodes = replaced
    tasks = (Task(f"{n:032}", {"number": n, "slow": str(tmp_path / "s")}) for n in range(12))
    with flow_in(tmp_path) as flow:
        numbers = [number for number, _ in flow.run("some", wait_twice, tasks, cpus=2)]
    assert sorted(numbers) == list(range(12)) and flow.done == {"some": 12} and (tmp_path / "s").read_text() == "xxx"


def test_a_look_at_many_tasks_that_wait_for_a_copy_is_quick(tmp_path, forked):
    """On a large cluster, a file that the nodes lack stops every task. Comparing each task with all others took seconds."""
    waiting = crew.Crew(flow_in(tmp_path), TaskKind("some", print, print))
    waiting.later = [Started(n, Task(f"{n:032}", {}), copy=Future()) for n in range(20_000)]
    begin = time.process_time()
    assert waiting._start_due() == crew.AWAY_S and len(waiting.later) == 20_000
    assert time.process_time() - begin < 1


def call(size: int = 0) -> Call:
    return Call([Started(0, Task("k", {}, bytes=size))], 1)


@pytest.mark.parametrize("seed", range(200))
def test_a_group_is_short_and_leaves_calls_for_every_cpu(seed):
    """Short tasks end first, so a group is limited by the bytes of its tasks, not by the mean time of the tasks that ended. The
    driver starts at most one call per `start_s` seconds, so on many CPUs a call is longer. A call leaves tasks for every CPU, or
    ends before the driver has started the other calls."""
    rng = random.Random(seed)
    start_s = rng.choice([ray_tasks.START_S, dispatchers.START_S])
    times = CallTimes(start_s)
    rate = 10 ** rng.uniform(-9, -5)
    for _ in range(rng.randint(1, 40)):
        one = call(rng.randint(1, 10**7))
        times.add(one, [rate * one.size])
    left, slots, group = rng.randint(0, 10**6), rng.choice([1, 100, 500, 16_000]), list[Started]()
    longest = calls.CALL_S + calls.SLOT * start_s * slots
    while times.has_room(group, more := Started(0, Task("k", {}, bytes=rng.randint(1, 10**7))), left, slots):
        group.append(more)
    assert len(group) <= calls.MOST_TASKS and sum(rate * one.size for one in group) <= longest * 1.001
    seconds = sum(rate * one.size for one in group)
    leaves = len(group) * slots * calls.ROUNDS <= left or len(group) * seconds <= left * start_s * 1.001
    assert not group or (times.tasks >= calls.MEASURED and leaves)


def test_calls_begin_in_their_order_as_others_end():
    slots, three = CallSlots(), [call(), call(), call()]
    for one in three:
        slots.start(one, 1.0)
    assert [one.began for one in three] == [1.0, None, None]
    slots.end(three[1], 2.0)  # the cluster began it earlier than expected
    slots.end(three[0], 3.0)
    assert three[2].began == 3.0 and slots.running == 1
    slots.end(three[2], 4.0)
    assert slots.running == 0 and not slots.waiting


def test_a_call_is_late_by_its_size_and_only_if_most_have_ended():
    times = CallTimes(1e-3)
    for _ in range(6):
        times.add(call(100), [20.0])
    small, large = call(100), call(1000)
    small.began = large.began = 0.0
    assert times.late([small, large], 24.0) == [] and times.late([small, large], 26.0) == [small]
    assert times.late([large, small], 500.0) == [small, large]
    assert times.late([small, large, call()], 500.0) == [], "most calls are still running"
    large.tasks[0] = Started(0, Task("k", {}, bytes=1000, can_repeat=False))
    assert copied(times.late([small, large], 500.0), 9) == [small.tasks], "two copies would fetch from one host"
    large.tasks[0] = Started(0, Task("k", {}, bytes=1000))
    small.tasks[0] = Started(0, Task("k", {}, bytes=100, careful=True), trouble=care.Trouble(count=1))
    assert copied(times.late([small, large], 500.0), 9) == [large.tasks], "its notes are for one process"


@pytest.mark.parametrize("seed", range(100))
def test_each_task_of_late_calls_is_copied_once_by_as_many_calls_as_cpus_are_idle(seed):
    """Tasks that one call would run one after another end earlier on several idle CPUs. A task is in its late call and in a late
    copy of it, and must not start twice at the same time. Tasks that have ended, or have had enough copies, need no copy. A late
    copy allows more of them: at 100 TB, a slow task whose two copies were slow too held the shards for two minutes and a half."""
    rng, number, late = random.Random(seed), 0, list[Call]()
    for _ in range(rng.randint(1, 6)):
        late.append(Call([Started(number + n, Task(f"{number + n}", {})) for n in range(rng.randint(1, 9))], 1))
        number += 9
        late += [Call(late[-1].tasks[:1], 1, copy=True)] if rng.random() < 0.3 else []
    for call in late:
        for one in call.tasks:
            one.ended, one.copies = rng.random() < 0.2, rng.choice([0, 0, 0, calls.COPIES, calls.MOST_COPIES])
    most = {call: calls.MOST_COPIES if call.copy else calls.COPIES for call in late}
    needed = {one for call in late for one in call.tasks if not one.ended and one.copies < most[call]}
    idle = rng.choice([1, 2, 5, 20, 100])
    groups = copied(late, idle)
    several = [one for group in groups for one in group]
    assert len(groups) <= idle and all(groups) and len(set(several)) == len(several) and {*several} <= needed
    assert idle < len(late) or {*several} == needed
    assert idle < 9 * len(late) or all(len(group) == 1 for group in groups)
