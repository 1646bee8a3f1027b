"""Tests dispatchers on a real Ray: tasks, errors, and lost processes are the same as without dispatchers."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.storage.retries import Backoff
from heliostat.tasks import crew, dispatchers, ray_tasks
from heliostat.tasks.clusters import TaskKind
from heliostat.tasks.dispatchers import DispatchedTasks, Dispatcher, Dispatchers
from heliostat.tasks.flow import Flow, Task, execute_all
from heliostat.tasks.ray_tasks import RayTasks
from heliostat.tasks.work import Work
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_list

from tests.waiting import until

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.ci]
COUNT = 300


@pytest.fixture
def flow(tmp_path, monkeypatch) -> Iterator[Flow]:
    monkeypatch.setattr(dispatchers, "CPUS_EACH", 1)
    monkeypatch.setattr(dispatchers, "MOST", 2)
    monkeypatch.setattr(crew, "PAUSE", Backoff(0.01, 0.01))
    with Flow(Work(Location(str(tmp_path / "work")))) as made:
        yield made


def mark(folder: Location, number: int, ran: str, owners: object) -> dict[str, object]:
    """Marks that a task ran. Some tasks end their process, raise an error, or wait, at their first run."""
    with Path(ran, str(number)).open("a") as file:
        file.write("x")
    again = Path(ran, str(number)).stat().st_size > 1
    if number == 17 and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 18 and not again:
        raise ValueError("not now")
    return {"number": number, "owners": owners}


def tasks_of(flow: Flow, ran: Path, count: int = COUNT) -> Iterator[Task]:
    ran.mkdir()
    shared = {"owners": flow.share(["a", "b"])}
    return (Task(f"{n:032}", {"number": n, "ran": str(ran)}, shared) for n in range(count))


def test_every_task_has_one_record_and_failed_tasks_run_again(flow, tmp_path):
    """A shared argument reaches the tasks. One task ends its process, and another raises an error: they run again."""
    records = flow.all("some", mark, tasks_of(flow, tmp_path / "ran"))
    assert isinstance(flow.cluster.dispatchers, Dispatchers)
    assert [(record["number"], record["owners"]) for record in records] == [(n, ["a", "b"]) for n in range(COUNT)]
    runs = Counter({int(path.name): path.stat().st_size for path in (tmp_path / "ran").iterdir()})
    assert len(runs) == COUNT and runs[17] == runs[18] == 2 and flow.done == {"some": COUNT}


def nothing(folder: Location, number: int) -> dict[str, object]:
    return {"number": number}


def test_a_dispatcher_stores_the_function_of_its_tasks_once(flow):
    """With one remote function per batch, Ray stores thousands, each worker loads most of them, and Ray never forgets them."""
    before = _remote_functions()
    assert len(flow.all("some", nothing, (Task(f"{n:032}", {"number": n}) for n in range(COUNT)))) == COUNT
    assert len(flow.all("others", nothing, (Task(f"{n:032}", {"number": n}) for n in range(COUNT)))) == COUNT
    assert 1 <= len(_remote_functions() - before) <= len(flow.cluster.dispatchers.actors)


def _remote_functions() -> set[bytes]:
    return {key for key in _internal_kv_list(b"", namespace=b"fun") if b"RemoteFunction" in key}


def slow(folder: Location, number: int, ran: str) -> dict[str, object]:
    Path(ran, str(number)).touch()
    time.sleep(0.2)
    return {"number": number}


def test_the_tasks_of_a_dead_dispatcher_run_again(flow, tmp_path, caplog):
    ran = tmp_path / "ran"
    ran.mkdir()
    killed = list[int]()

    def tasks() -> Iterator[Task]:
        for n in range(COUNT):
            if n == 100:
                ray.kill(flow.cluster.dispatchers.actors[0])
                killed.append(n)
            yield Task(f"{n:032}", {"number": n, "ran": str(ran)})

    flow.cluster.executor(TaskKind("none", execute_all, slow))
    before = list(flow.cluster.dispatchers.actors)
    values = dict(flow.run("some", slow, tasks()))
    assert killed and sorted(values) == list(range(COUNT)) and all(values[n]["number"] == n for n in values)
    assert flow.cluster.dispatchers.actors[0] is not before[0] and flow.cluster.dispatchers.actors[1] is before[1]
    assert "a dispatcher died" in caplog.text


def wrong(folder: Location, number: int) -> dict[str, object]:
    raise DataError(f"input: file {number} is damaged. Repair the file")


def test_the_error_of_a_task_is_raised_as_it_is(flow):
    with pytest.raises(DataError, match=r"^input: file \d is damaged. Repair the file$"):
        flow.all("some", wrong, (Task(f"{n:032}", {"number": n}) for n in range(4)))


class Unreadable:
    """Can be sent, but not received."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _raise, ()


def _raise() -> None:
    raise ValueError("can't be read")


def test_calls_that_a_dispatcher_cannot_read_have_its_error(flow):
    """Without this error, the driver would wait for the calls forever."""
    with pytest.raises(Exception, match="can't be read"):
        flow.all("some", mark, iter([Task("0" * 32, {"number": Unreadable()})]))


def hang(folder: Location, number: int, ran: str) -> dict[str, object]:
    Path(ran, str(number)).touch()
    for _ in range(6000):  # Ray can't interrupt one long sleep
        time.sleep(0.1)
    return {}


def test_calls_are_withdrawn_and_ended(tmp_path, monkeypatch):
    """A withdrawn call never runs, and running tasks end."""
    monkeypatch.setattr(dispatchers.ray_tasks, "ENDING_S", 0.1)
    sender = Dispatchers(2, {})
    executor = DispatchedTasks(TaskKind("some", execute_all, hang), sender)
    most = int(ray.cluster_resources()["CPU"])
    work = (Work(Location(str(tmp_path))), "run", "some")
    numbers = [
        executor.start(work, [Task(f"{n:032}", {"number": n, "ran": str(tmp_path)})], {}, cpus, None)
        for n, cpus in enumerate([1, 1, 10 * most])
    ]
    assert executor.ended(numbers, 0.1) == []
    until(lambda: all((tmp_path / str(n)).exists() for n in range(2)), "two tasks run")
    assert executor.withdraw(numbers[2:]) == numbers[2:]
    assert executor.end(numbers) == 0
    sender.close()


def test_canceled_calls_do_not_end_as_failed_calls(tmp_path):
    """While a dispatcher cancels calls, its other thread waits for the same calls. If that thread returned a canceled call, the
    driver would log a failed task, and count the failure."""
    sender = Dispatchers(1, {})
    executor = DispatchedTasks(TaskKind("some", execute_all, hang), sender)
    most, work = int(ray.cluster_resources()["CPU"]), (Work(Location(str(tmp_path))), "run", "some")
    numbers = [
        executor.start(work, [Task(f"{n:032}", {"number": n, "ran": str(tmp_path)})], {}, 10 * most, None) for n in range(COUNT)
    ]
    assert executor.ended(numbers, 0.1) == [] and sorted(executor.withdraw(numbers)) == numbers
    assert executor.ended(numbers, 2.0) == []
    sender.close()


def test_a_cluster_that_grows_during_a_run_ends_the_repeated_calls_of_both_sizes(tmp_path, monkeypatch):
    """The driver starts the tasks of a small cluster itself, and dispatchers start those of a large one. Before, the command
    ended with a TypeError of Ray after all its work, and its dispatchers continued."""
    monkeypatch.setattr(ray_tasks, "ENDING_S", 0.1)
    kind, work = TaskKind("some", execute_all, hang), (Work(Location(str(tmp_path))), "run", "some")
    with Flow(Work(Location(str(tmp_path / "work")))) as flow:
        for number in range(2):
            executor = flow.cluster.executor(kind)
            task = Task(f"{number:032}", {"number": number, "ran": str(tmp_path)})
            flow.repeated.append((executor, executor.start(work, [task], {}, 1, None)))
            executor.send()
            monkeypatch.setattr(dispatchers, "CPUS_EACH", 1)
        assert isinstance(flow.repeated[0][0], RayTasks) and isinstance(executor, DispatchedTasks)
        until(lambda: all((tmp_path / str(n)).exists() for n in range(2)), "both run")
    assert flow.cluster.dispatchers is None and not flow.repeated
    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], "no task runs")


class SlowDispatcher(Dispatcher):
    """Withdraws calls too late."""

    def withdraw(self, numbers: list[int]) -> list[int]:
        time.sleep(3.0)
        return super().withdraw(numbers)


def test_calls_of_a_dispatcher_that_answers_too_late_run_again(tmp_path, monkeypatch, caplog):
    """The late dispatcher forgets the calls that it withdraws. The driver would wait for these calls forever."""
    monkeypatch.setattr(dispatchers, "Dispatcher", SlowDispatcher)
    sender = Dispatchers(1, {})
    executor = DispatchedTasks(TaskKind("some", execute_all, hang), sender)
    most, work = int(ray.cluster_resources()["CPU"]), (Work(Location(str(tmp_path))), "run", "some")
    numbers = [executor.start(work, [Task(f"{n:032}", {"number": n, "ran": ""})], {}, 10 * most, None) for n in range(3)]
    until(lambda: executor.ended(numbers, 0.1) == [] and not sender.sent, "the dispatcher has the calls")
    monkeypatch.setattr(dispatchers, "ANSWER_S", 0.5)
    assert executor.withdraw(numbers) == [] and "didn't answer within" in caplog.text
    assert sorted(executor.ended(numbers, 10.0)) == numbers
    for number in numbers:
        with pytest.raises(RayError) as error:
            executor.records(number)
        assert ray_tasks.is_lost(error.value)
    sender.close()


@pytest.mark.parametrize(("cpus", "count"), [(1, 0), (1999, 0), (2000, 2), (16_000, 16), (1_000_000, 16)])
def test_only_large_clusters_have_dispatchers(cpus, count):
    assert dispatchers.needed(cpus) == count


def touch(folder: Location, number: int, ran: str) -> dict[str, object]:
    Path(ran, str(number)).touch()
    return {"number": number}


def test_tasks_that_start_ahead_run_before_their_records_are_needed(flow, tmp_path):
    """The driver sends several calls at once, but not later than when all tasks have started."""
    records = flow.ahead("some", touch, (Task(f"{n:032}", {"number": n, "ran": str(tmp_path)}) for n in range(3)))
    until(lambda: all((tmp_path / str(n)).exists() for n in range(3)), "the tasks run")
    assert [record["number"] for record in records()] == [0, 1, 2]
