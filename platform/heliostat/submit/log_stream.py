"""Follows a job's log as it grows: a line is here a quarter of a second behind its being written.

The log is a file on the job's node, which Ray's dashboard streams from its beginning (`/api/v0/logs/stream`). Ray's own way to
follow a job looks at that file every three seconds, and all that a job says would be seen that much late.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass

from heliostat.errors import ClusterError

log = logging.getLogger(__name__)

LOG_FILE = "job-driver-{}.log"  # Ray's name for it
INTERVAL_S = 0.25  # between two looks at the file, where it lies
QUIET_S = 1.0  # without anything new, after which the cluster is asked for the job
AGAIN_S = 0.5
CONNECT_S = 10.0


@dataclass(frozen=True)
class State:
    """Describes a job as its cluster tells it: the node that its log lies on, once it has one, and whether the job is over."""

    node: str | None
    over: bool


def follow(url: str, headers: dict[str, str], job_id: str, ask: Callable[[], State], budget_s: float) -> Iterator[str]:
    """Yields what is added to the log until the job is over; after a broken connection, only what is new.

    `ask` asks the cluster for the job, and what it raises ends this. ClusterError where a log cannot be read for `budget_s`.
    """
    import aiohttp

    came, decoder, deadline = 0, codecs.getincrementaldecoder("utf-8")("replace"), time.monotonic() + budget_s
    while True:
        state, skip = ask(), came
        try:
            for data in _ticking(_stream(url, headers, job_id, state.node)) if state.node else ():
                if not data and state.over:
                    return
                if not data:
                    state = ask()
                    continue
                new, skip = data[skip:], max(0, skip - len(data))
                came, deadline = came + len(new), time.monotonic() + budget_s
                if text := decoder.decode(new):
                    yield text
        except (OSError, aiohttp.ClientError) as e:
            text = " ".join(str(e).split())[:200]
            if time.monotonic() > deadline:
                raise ClusterError(f"following the log: {text}") from e
            log.log(logging.WARNING if came else logging.DEBUG, "following the log: %s; trying again", text)
        if not state.node:  # its turn has not come, or never will
            if state.over:
                return
            deadline = time.monotonic() + budget_s
        time.sleep(AGAIN_S)


async def _stream(url: str, headers: dict[str, str], job_id: str, node: str | None) -> AsyncGenerator[bytes]:
    """Yields the log's bytes from its beginning, and what is added for as long as the connection lasts."""
    import aiohttp

    wanted = {"node_id": node or "", "filename": LOG_FILE.format(job_id), "lines": "-1", "interval": str(INTERVAL_S)}
    times = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    async with (
        aiohttp.ClientSession(headers=headers, timeout=times, raise_for_status=True) as session,
        session.get(f"{url}/api/v0/logs/stream", params=wanted) as answer,
    ):
        async for data in answer.content.iter_any():
            yield data


def _ticking(source: AsyncGenerator[bytes]) -> Iterator[bytes]:
    """Yields what comes, and nothing, `b""`, for each time that nothing has come for QUIET_S."""
    with asyncio.Runner() as runner:
        while True:
            coming = runner.get_loop().create_task(anext(source))
            while not runner.run(asyncio.wait([coming], timeout=QUIET_S))[0]:
                yield b""
            try:
                yield coming.result()
            except StopAsyncIteration:
                return
