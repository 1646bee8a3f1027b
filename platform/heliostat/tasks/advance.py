"""Reads from an object store in advance: several files at the same time, while a task works on the tables that it has."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

FILES = 16  # files that are read at the same time
ADVANCE_BYTES = 32 << 20  # maximum bytes of memory for reads in advance, except the read for which the task waits
Item = TypeVar("Item")
Reserve = Callable[[int], None]
"""Reserves bytes of memory for a read, before the read begins. Waits until the memory is free. Releases memory if the number is
negative."""


def unlimited(bytes: int) -> None:
    """Reserves any number of bytes at once, for a task that reads nothing in advance."""


class _StoppedError(Exception):
    """Ends a read whose task has stopped reading."""


@dataclass
class _Begun(Generic[Item]):
    """Holds the items of a read until the task takes them. `reserved`: bytes that the read has reserved for its next item."""

    items: deque[tuple[Item | BaseException, int]] = field(default_factory=deque)
    reserved: int = 0
    ended: bool = False


class _Advance(Generic[Item]):
    """Shares ADVANCE_BYTES of memory among reads. The first read doesn't wait for memory if the task waits for its next item."""

    def __init__(self) -> None:
        self.reads, self.changed = deque[_Begun[Item]](), threading.Condition()
        self.bytes, self.stopped = 0, False

    def begin(self) -> _Begun[Item]:
        with self.changed:
            self.reads.append(_Begun())
            return self.reads[-1]

    def reserve(self, read: _Begun[Item], bytes: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self._fits(bytes) or self._is_next(read))
            if self.stopped:
                raise _StoppedError
            self.bytes, read.reserved = self.bytes + bytes, read.reserved + bytes
            self.changed.notify_all()

    def _fits(self, bytes: int) -> bool:
        return bytes <= 0 or self.bytes + bytes <= ADVANCE_BYTES

    def _is_next(self, read: _Begun[Item]) -> bool:
        return read is self.reads[0] and not read.items

    def put(self, read: _Begun[Item], item: Item | BaseException) -> None:
        with self.changed:
            if self.stopped:
                raise _StoppedError
            read.items.append((item, read.reserved))
            read.reserved = 0
            self.changed.notify_all()

    def end(self, read: _Begun[Item]) -> None:
        with self.changed:
            self.bytes, read.ended = self.bytes - read.reserved, True
            self.changed.notify_all()

    def items(self) -> Iterator[Item]:
        """Yields the items of the first read, and then removes the read. An item's memory is then the task's own."""
        read = self.reads[0]
        while True:
            with self.changed:
                self.changed.wait_for(lambda: read.items or read.ended)
                if not read.items:
                    self.reads.popleft()
                    self.changed.notify_all()
                    return
                item, bytes = read.items.popleft()
                self.bytes -= bytes
                self.changed.notify_all()
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def in_advance(reads: Iterable[Callable[[Reserve], Iterator[Item]]]) -> Iterator[Item]:
    """Yields the items of several reads, in their order. FILES threads continue the first reads, and hold at most ADVANCE_BYTES
    bytes of their items. Raises the error of a read in the place of the read's next item.

    A read gets a function with which it reserves the memory of its next item.
    """
    left, advance = iter(reads), _Advance[Item]()

    def fill(read: Callable[[Reserve], Iterator[Item]], begun: _Begun[Item]) -> None:
        try:
            for item in read(partial(advance.reserve, begun)):
                advance.put(begun, item)
        except _StoppedError:
            return
        except BaseException as e:  # noqa: BLE001 (raised where the item is expected)
            advance.put(begun, e)
        finally:
            advance.end(begun)

    with ThreadPoolExecutor(FILES) as pool:

        def begin(count: int) -> None:
            for read in islice(left, count):
                pool.submit(fill, read, advance.begin())

        try:
            begin(FILES)
            while advance.reads:
                yield from advance.items()
                begin(1)
        finally:
            advance.stop()
