"""Reads from an object store in advance: several files at the same time, while a task works on the tables that it has."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

FILES = 8  # files that are read at the same time
HELD = 2  # items of each file that wait for the task
STOP_S = 0.5  # seconds between checks whether the task has stopped reading
Item = TypeVar("Item")


def in_advance(reads: Iterable[Iterator[Item]]) -> Iterator[Item]:
    """Yields the items of several reads, in their order. FILES threads continue the first reads, up to HELD items ahead. Raises
    the error of a read in the place of the read's next item."""
    left, begun, stopped = iter(reads), deque[queue.Queue[Item | BaseException | None]](), threading.Event()

    def put(waiting: queue.Queue[Item | BaseException | None], item: Item | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=STOP_S)
            except queue.Full:
                continue
            return True
        return False

    def fill(read: Iterator[Item], waiting: queue.Queue[Item | BaseException | None]) -> None:
        try:
            for item in read:
                if not put(waiting, item):
                    return
        except BaseException as e:  # noqa: BLE001 (raised where the item is expected)
            put(waiting, e)
        else:
            put(waiting, None)

    with ThreadPoolExecutor(FILES) as pool:

        def begin(count: int) -> None:
            for read in islice(left, count):
                begun.append(queue.Queue(HELD))
                pool.submit(fill, read, begun[-1])

        try:
            begin(FILES)
            while begun:
                while (item := begun[0].get()) is not None:
                    if isinstance(item, BaseException):
                        raise item
                    yield item
                begun.popleft()
                begin(1)
        finally:
            stopped.set()
