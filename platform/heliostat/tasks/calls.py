"""Groups short tasks into calls of the cluster, and finds calls that take much longer than others of their kind.

A call runs its tasks one after another in one process, and each task writes its own record. So the driver's cost per call is
shared by several tasks, and nothing is repeated if the call fails in the middle.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from heliostat.tasks.care import Trouble
from heliostat.tasks.clusters import Task
from heliostat.tasks.shipping import Shipment

CALL_S = 15.0  # seconds that the tasks of a call take together, if one task is shorter
SLOT = 1.6  # starts of a call whose time is added for each call that can run at once, because the driver starts few per second
MOST_TASKS = 64  # tasks of a call
GROUPS = 256  # groups of tasks with different shared arguments that wait for more tasks. The driver looks up 4,096 at once
MEASURED = 16  # tasks that have ended before tasks are grouped
ROUNDS = 1  # calls for each CPU that must remain, so that the last calls end at about the same time
KEPT = 256  # calls from whose times the usual time is computed
LATE, LATE_S = 1.25, 3.0  # a call is late after LATE times the usual time, and at least LATE_S seconds
ENDED = 3  # calls that have ended, for each running one, before a call can be late
COPIES, MOST_COPIES = 2, 4  # copies of a task in a late call: of many copies, some are late too, and allow more copies


@dataclass(eq=False, slots=True)
class Started:
    """Describes a task that has started: its number among the tasks of its kind, its failures, and the time to start it again.
    On 16,000 CPUs, hundreds of thousands are under way."""

    number: int
    task: Task
    trouble: Trouble = field(default_factory=Trouble)
    due: float = 0.0
    offered: tuple[Shipment, ...] = ()
    """Shipments (files) that the task's node lacked, and that the driver copied to the work folder."""
    copy: Future[None] | None = None
    """The last copy of a shipment to the work folder. The task starts again when this copy is complete."""
    calls: list[Call] = field(default_factory=list)
    """Calls under way that run the task."""
    copies: int = 0
    """Number of copies that have started since the task last started alone or in its group."""
    ended: bool = False
    """Whether a call with the task has ended, so that the task's record is known."""

    @property
    def waits(self) -> bool:
        return self.copy is not None and not self.copy.done()

    @property
    def size(self) -> int:
        """Returns the bytes that the task reads, or 1 if they aren't known."""
        return self.task.bytes or 1

    def can_repeat(self, most: int) -> bool:
        """Checks whether another one of `most` copies may start. Careful tasks that have failed write notes, which two copies
        can't share."""
        notes = self.task.careful and bool(self.trouble.count or self.trouble.crashed)
        return self.task.can_repeat and not notes and not self.ended and self.copies < most

    @property
    def shared(self) -> frozenset[tuple[str, int]]:
        """Identifies the task's shared arguments. One call can run several tasks if these are the same objects."""
        return frozenset((name, id(value)) for name, value in self.task.shared.items())


@dataclass(eq=False, slots=True)
class Call:
    """Describes a call that runs tasks. `began`: when its first task began, as far as the driver can tell; None while the call
    waits for a CPU. Several calls may run the same task, if one of them is late. `copy`: whether another call ran the tasks when
    this one started."""

    tasks: list[Started]
    cpus: int
    began: float | None = None
    reference: Any = None
    copy: bool = False
    ended: bool = False

    @property
    def size(self) -> int:
        """Returns the bytes that the tasks read, or the number of tasks if the bytes aren't known."""
        return sum(one.size for one in self.tasks)

    @property
    def left(self) -> list[Started]:
        """Lists the tasks that no call has ended yet."""
        return [one for one in self.tasks if not one.ended]

    def leave(self) -> None:
        """Ends the call's part in its tasks."""
        for one in self.tasks:
            one.calls.remove(self)


class CallTimes:
    """Holds the times of a kind's tasks and calls that have ended. `start_s`: seconds in which the driver starts a call."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.tasks = self.calls = self.size = 0
        self.seconds = 0.0
        self.rates = deque[float](maxlen=KEPT)

    def add(self, call: Call, walls: Iterable[float]) -> None:
        """Adds a call that has ended. `walls`: the seconds of each of its tasks."""
        seconds = sum(walls)
        self.tasks += len(call.tasks)
        self.calls += 1
        self.seconds += seconds
        self.size += call.size
        self.rates.append(seconds / call.size)

    def has_room(self, group: list[Started], more: Started, left: int, slots: int) -> bool:
        """Checks whether a call can run one more task after those of `group`. `left`: tasks that haven't started; `slots`: calls
        that can run at the same time.

        Calls are short enough that each CPU still gets ROUNDS call, or that a call ends before the driver has started the calls
        of all other tasks.
        """
        count = len(group) + 1
        if self.tasks < MEASURED or count > MOST_TASKS:
            return False
        seconds = sum(one.size for one in [*group, more]) * self.seconds / max(1, self.size)
        fills = count <= left // (ROUNDS * max(1, slots)) or count * seconds <= left * self.start_s
        return fills and seconds <= CALL_S + SLOT * self.start_s * slots

    def late(self, calls: list[Call], now: float) -> list[Call]:
        """Lists the running calls that are late, the latest first."""
        if self.calls < ENDED * len(calls):
            return []
        usual = statistics.median(self.rates) if self.rates else 0.0
        beyond = [(now - call.began - max(LATE_S, LATE * usual * call.size), call) for call in calls if call.began is not None]
        return [call for excess, call in sorted(beyond, key=lambda one: -one[0]) if excess > 0]


def copied(late: list[Call], idle: int) -> list[list[Started]]:
    """Divides the tasks of late calls that may have another copy among at most `idle` calls. If there are enough idle CPUs, each
    task gets its own call, because the tasks of a late call would otherwise run one after another again."""
    seen, needed = set[Started](), list[list[Started]]()
    for call in late:
        most = MOST_COPIES if call.copy else COPIES
        if tasks := [one for one in call.left if one.can_repeat(most) and one not in seen]:
            seen.update(tasks)
            needed.append(tasks)
    each = max(1, idle // max(1, len(needed)))
    return [tasks[at::each] for tasks in needed[:idle] for at in range(min(each, len(tasks)))]


class CallSlots:
    """Estimates when each call began. A cluster starts the calls in their order as CPUs become free."""

    def __init__(self) -> None:
        self.count = 1
        self.running = 0
        self.waiting = deque[Call]()

    def start(self, call: Call, now: float) -> None:
        if self.running < self.count:
            call.began, self.running = now, self.running + 1
        else:
            self.waiting.append(call)

    def end(self, call: Call, now: float) -> None:
        """Ends a call, and begins the calls that have waited the longest."""
        call.ended = True
        self.running -= call.began is not None
        while self.waiting and (self.running < self.count or self.waiting[0].ended):
            if not (following := self.waiting.popleft()).ended:
                following.began, self.running = now, self.running + 1
