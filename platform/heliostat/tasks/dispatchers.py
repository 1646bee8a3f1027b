"""Starts Ray tasks from several processes, because one process starts only about a thousand Ray tasks per second.

A dispatcher is a Ray actor that starts Ray tasks, waits for them, and returns their records. The driver sends it several calls at
once, and receives the records of several calls at once. If a dispatcher dies, Ray ends its tasks. The driver then starts another
dispatcher, and the tasks run again like those of a lost node.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from heliostat.tasks import ray_tasks
from heliostat.tasks.clusters import Task, TaskKind
from heliostat.tasks.ray_tasks import RayTasks, sent

CPUS_EACH, MOST = 1000, 16  # CPUs of a cluster for each dispatcher, and maximum number of dispatchers
START_S = 0.3e-3  # seconds in which the driver starts a call through a dispatcher
BATCH = 32  # calls that a dispatcher receives at once: it starts them in about 30 ms
POLL_S = 1.0  # seconds after which a dispatcher answers, even if no call has ended
LOOK_S = 0.2  # seconds between a dispatcher's looks for new calls while it waits
THREADS = 3  # of a dispatcher: one waits for calls, the others start and cancel calls
ANSWER_S = ray_tasks.ENDING_S + ray_tasks.END_S + 10.0  # seconds for a dispatcher to cancel calls
log = logging.getLogger(__name__)
Result = list[dict[str, Any]] | ray.ObjectRef[Any] | Exception
"""The records of a call; for a call that failed, its Ray reference or its error."""


def needed(cpus: int) -> int:
    """Returns the number of dispatchers for a cluster with `cpus` CPUs; 0 if the driver starts the tasks itself."""
    count = min(MOST, cpus // CPUS_EACH)
    return count if count > 1 else 0


@dataclass(frozen=True)
class SentCall:
    """Describes a call that a dispatcher starts: its number, the tasks' keys and arguments, and the arguments of
    `RayTasks.begin`."""

    number: int
    tasks: list[tuple[str, dict[str, Any]]]
    shared: Mapping[str, object]
    cpus: int
    memory: int | None
    backup: bool


class Dispatcher:
    """Starts calls as Ray tasks, in an actor's process."""

    def __init__(self) -> None:
        self.running: dict[Any, int] = {}
        self.failed: list[tuple[int, Result]] = []  # calls that couldn't start
        self.remotes: dict[Any, Any] = {}  # Ray stores each remote function, and workers load it, so batches share one
        self.lock = threading.Lock()

    def begin(self, kind: TaskKind, arguments: tuple[Any, ...], calls: list[SentCall]) -> None:
        """Starts some calls of one kind."""
        tasks = RayTasks(kind)
        tasks.remote = self.remotes.setdefault(kind.execute, tasks.remote)
        for call in calls:
            try:
                reference = tasks.begin(arguments, call.tasks, call.shared, call.cpus, call.memory, call.backup)
            except Exception as e:  # noqa: BLE001 (the driver raises it)
                with self.lock:
                    self.failed.append((call.number, e))
            else:
                with self.lock:
                    self.running[reference] = call.number

    def ended(self, wait_s: float) -> list[tuple[int, Result]]:
        """Waits up to `wait_s` seconds for a call to end. Returns the number and the result of all calls that have ended."""
        until = time.monotonic() + wait_s
        while True:
            with self.lock:
                results, self.failed, references = self.failed, [], list(self.running)
            ready = ray_tasks.ended(references, LOOK_S) if references else []
            results += [(number, _result(reference)) for reference, number in self._popped(ready)]
            if results or time.monotonic() >= until:
                return results
            if not references:
                time.sleep(LOOK_S)

    def withdraw(self, numbers: list[int]) -> list[int]:
        """Cancels those of the calls that haven't ended, and returns their numbers."""
        calls = dict(self._popped(self._references(numbers)))  # so that `ended` doesn't return a canceled call as a failed one
        withdrawn = [calls.pop(reference) for reference in ray_tasks.withdrawn(list(calls))]
        with self.lock:
            self.running |= calls
        return withdrawn

    def end(self, numbers: list[int]) -> int:
        """Ends calls. Returns the number of calls that didn't end in time."""
        references = self._references(numbers)
        self._popped(references)
        return ray_tasks.end(references)

    def _references(self, numbers: list[int]) -> list[Any]:
        wanted = set(numbers)
        with self.lock:
            return [reference for reference, number in self.running.items() if number in wanted]

    def _popped(self, references: Iterable[Any]) -> list[tuple[Any, int]]:
        """Removes calls from `running`. Returns (reference, number) of those that no other thread has removed."""
        with self.lock:
            numbers = [(reference, self.running.pop(reference, None)) for reference in references]
        return [(reference, number) for reference, number in numbers if number is not None]


def _result(reference: Any) -> Result:
    try:
        return ray.get(reference)
    except Exception:  # noqa: BLE001 (the driver raises it, from the reference)
        return reference


class Dispatchers:
    """Sends calls to dispatchers in turn, and receives the results."""

    def __init__(self, count: int, labels: Mapping[str, str]) -> None:
        options = {"num_cpus": 0, "max_concurrency": THREADS, "scheduling_strategy": "SPREAD"}
        actor_class: Any = ray.remote(Dispatcher)
        self.actor = actor_class.options(**options, label_selector=dict(labels) or None)
        self.actors: list[Any] = [self.actor.remote() for _ in range(count)]
        self.polls: dict[Any, int] = {}
        for place in range(count):
            self._poll(place)
        self.numbers, self.turn = itertools.count(), 0
        self.owners: dict[int, tuple[int, DispatchedTasks]] = {}  # of each call under way: the dispatcher's place, the executor
        self.sent: dict[Any, list[int]] = {}  # batches that a dispatcher hasn't confirmed

    def send(self, owner: DispatchedTasks, arguments: tuple[Any, ...], calls: list[SentCall]) -> None:
        """Sends calls to the next dispatcher."""
        self.turn = (self.turn + 1) % len(self.actors)
        numbers = [call.number for call in calls]
        self.sent[self.actors[self.turn].begin.remote(owner.kind, arguments, calls)] = numbers
        self.owners.update(dict.fromkeys(numbers, (self.turn, owner)))

    def receive(self, wait_s: float) -> None:
        """Waits up to `wait_s` seconds for a dispatcher's answer, and gives the results of calls to their executors."""
        polls = list(self.polls)
        if not ray.wait(polls, num_returns=1, timeout=wait_s)[0]:
            return
        for poll in ray.wait(polls, num_returns=len(polls), timeout=0)[0]:
            place = self.polls[poll]
            try:
                results = ray.get(poll)
            except RayError as e:
                self._replace(place, e)
            else:
                del self.polls[poll]
                self._poll(place)
                self._give(results)
        self._check_sent(0.0)

    def withdraw(self, numbers: list[int]) -> list[int]:
        """Cancels those of the calls that haven't ended, and returns their numbers."""
        self._check_sent(ANSWER_S)
        withdrawn = [number for answer in self._asked("withdraw", numbers) for number in answer]
        for number in withdrawn:
            self.owners.pop(number, None)
        return withdrawn

    def end(self, numbers: list[int]) -> int:
        """Ends calls. Returns the number of calls that didn't end in time."""
        self._check_sent(ANSWER_S)
        left = sum(self._asked("end", numbers))
        for number in numbers:
            self.owners.pop(number, None)
        return left

    def close(self) -> None:
        """Kills the dispatchers, and with them the calls that still run."""
        for actor in self.actors:
            ray.kill(actor)

    def _asked(self, method: str, numbers: list[int]) -> Iterator[Any]:
        """Calls a method of the dispatchers with the calls of each. Yields the answers."""
        of_places = defaultdict[int, list[int]](list)
        for number in numbers:
            if number in self.owners:
                of_places[self.owners[number][0]].append(number)
        until = time.monotonic() + ANSWER_S
        answers = {getattr(self.actors[place], method).remote(own): place for place, own in of_places.items()}
        for answer, place in answers.items():
            try:
                yield ray.get(answer, timeout=max(0.0, until - time.monotonic()))
            except RayError as e:  # it may have canceled some of the calls, and then forgets them
                self._replace(place, e)

    def _check_sent(self, wait_s: float) -> None:
        """Gives the error of a batch that a dispatcher couldn't read to the batch's calls. Replaces dispatchers that haven't
        confirmed a batch after `wait_s` seconds, unless this is 0."""
        batches = list(self.sent)
        confirmed, silent = ray.wait(batches, num_returns=len(batches), timeout=wait_s) if batches else ([], [])
        for batch in confirmed:
            numbers = self.sent.pop(batch)
            try:
                ray.get(batch)
            except Exception as e:  # noqa: BLE001 (raised for each call)
                self._give((number, e) for number in numbers)
        late = {self.owners[number][0] for batch in silent for number in self.sent[batch] if number in self.owners}
        for place in late if wait_s else ():
            self._replace(place, GetTimeoutError("a dispatcher didn't confirm its calls"))

    def _poll(self, place: int) -> None:
        self.polls[self.actors[place].ended.remote(POLL_S)] = place

    def _replace(self, place: int, error: RayError) -> None:
        """Starts another dispatcher in the place of one that died or didn't answer, and gives the error to the calls of the
        latter."""
        problem = f"didn't answer within {ANSWER_S:.0f} s" if isinstance(error, GetTimeoutError) else "died"
        log.warning("a dispatcher %s. Starting another one", problem)
        log.debug("%s", error)
        self._give([(number, error) for number, (of_call, _) in self.owners.items() if of_call == place])
        ray.kill(self.actors[place])  # it may be alive
        self.actors[place] = self.actor.remote()
        self.polls = {poll: of_poll for poll, of_poll in self.polls.items() if of_poll != place}
        self._poll(place)

    def _give(self, results: Iterable[tuple[int, Result]]) -> None:
        for number, result in results:
            if number in self.owners:
                _, owner = self.owners.pop(number)
                owner.results[number] = result
                owner.new.append(number)


class DispatchedTasks:
    """Runs each call as a Ray task that a dispatcher starts. A reference is the number of a call."""

    ready, start_s = True, START_S

    def __init__(self, kind: TaskKind, dispatchers: Dispatchers) -> None:
        self.kind, self.dispatchers = kind, dispatchers
        self.arguments: tuple[Any, ...] = ()
        self.waiting: list[SentCall] = []
        self.results: dict[int, Result] = {}
        self.new: list[int] = []  # calls that have ended since the last look

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        if arguments != self.arguments:
            self.send()
            self.arguments = arguments
        number = next(self.dispatchers.numbers)
        self.waiting.append(SentCall(number, sent(tasks), shared, cpus, memory, backup))
        if len(self.waiting) >= BATCH:
            self.send()
        return number

    def send(self) -> None:
        if self.waiting:
            self.dispatchers.send(self, self.arguments, self.waiting)
            self.waiting = []

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        self.send()
        if not self.new:
            self.dispatchers.receive(wait_s)
        references, self.new = self.new, []
        return references

    def records(self, reference: Any) -> list[dict[str, Any]]:
        result = self.results.pop(reference)
        if isinstance(result, Exception):
            raise result.with_traceback(None)  # the calls of a dead dispatcher share the error
        return result if isinstance(result, list) else ray.get(result)

    def withdraw(self, references: list[Any]) -> list[Any]:
        self.send()
        return self.dispatchers.withdraw(references)

    def end(self, references: list[Any]) -> int:
        self.waiting.clear()
        return self.dispatchers.end(references)
