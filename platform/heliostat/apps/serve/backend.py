"""Sends requests to the replicas of the current version. If a replica dies before its first output, the request is sent again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

from heliostat.apps.serve.asks import Item
from heliostat.web.refusals import Refusal

log = logging.getLogger(__name__)

TRIES = 5
PAUSE_S = 0.2

Call = Callable[[str], Awaitable[Item]]  # maps a version to the answer of one of the version's replicas
Stream = Callable[[str], AsyncGenerator[Item]]


class Backend:
    """Keeps the current version, and the number of open requests of each version.

    `lost`: the types of errors that mean that a replica died. `deadline_s`: maximum seconds from a request to the end of the
    answer.
    """

    def __init__(self, lost: tuple[type[BaseException], ...], deadline_s: float) -> None:
        self.lost, self.deadline_s = lost, deadline_s
        self.open: Counter[str] = Counter()
        self.retried = 0
        self.current = ""
        self.ready = asyncio.Event()

    def use(self, version: str) -> dict[str, int]:
        """Sends all later requests to this version; returns the number of open requests of each version."""
        self.current = version
        self.ready.set()
        self.open = Counter({name: count for name, count in self.open.items() if count})
        return dict(self.open)

    async def ask(self, call: Call) -> tuple[str, Item]:
        """Returns the model version that answered, and the answer.

        Raises Refusal: with status 504 if no answer comes within the deadline, with status 503 if TRIES replicas have died.
        """
        end = asyncio.get_running_loop().time() + self.deadline_s
        for left in reversed(range(TRIES)):
            with self._counted(await self._version(end)) as version:
                try:
                    async with self._until(end):
                        return version, _sound(await call(version))
                except self.lost as e:
                    self._again(e, left)
            await asyncio.sleep(PAUSE_S)
        raise AssertionError("unreachable: the last attempt raised an error")

    async def stream(self, start: Stream) -> AsyncGenerator[tuple[str, Item]]:
        """Yields the items of a stream, each with the version that answers.

        Raises Refusal as in `ask`. Also raises Refusal with status 503 if the replica dies after its first item, because then the
        request can't be sent again.
        """
        end = asyncio.get_running_loop().time() + self.deadline_s
        for left in reversed(range(TRIES)):
            begun = False
            with self._counted(await self._version(end)) as version:
                try:
                    async with aclosing(start(version)) as items:
                        while (item := await self._next(items, end)) is not None:
                            begun = True
                            yield version, item
                    return
                except self.lost as e:
                    if begun:
                        said = (
                            "the replica that generated this answer died. To get the same text, send the request again "
                            "with the same seed"
                        )
                        raise Refusal(503, said, code="replica_died") from e
                    self._again(e, left)
            await asyncio.sleep(PAUSE_S)

    async def _next(self, items: AsyncGenerator[Item], end: float) -> Item | None:
        async with self._until(end):  # per item: a timeout belongs to one task, and a stream may change its task
            item = await anext(items, None)
        return None if item is None else _sound(item)

    async def _version(self, end: float) -> str:
        async with self._until(end):
            await self.ready.wait()
        return self.current

    @contextmanager
    def _counted(self, version: str) -> Iterator[str]:
        self.open[version] += 1
        try:
            yield version
        finally:
            self.open[version] -= 1

    @asynccontextmanager
    async def _until(self, end: float) -> AsyncIterator[None]:
        """Raises a Refusal with HTTP status 504 if the code in the `with` block is still running at the time `end`."""
        try:
            async with asyncio.timeout_at(end):
                yield
        except TimeoutError as e:
            raise Refusal(504, f"no answer within {self.deadline_s:g} s. Try again later", code="timeout") from e

    def _again(self, error: BaseException, left: int) -> None:
        self.retried += 1
        log.warning("a replica died during a request (%s); %d attempts are left for this request", type(error).__name__, left)
        if not left:
            raise Refusal(
                503, f"{TRIES} replicas died during this request. Read the endpoint's log", code="replica_died", retry_after=5
            ) from error


def _sound(item: Item) -> Item:
    """Returns an item. If the item contains a Refusal, raises this Refusal."""
    if "refused" in item:
        raise Refusal(*item["refused"])
    return item
