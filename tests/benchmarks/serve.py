"""Loads the endpoint: 200 clients for a minute; a replica is killed after a third of it, and the alias moved after another.

    python -m tests.benchmarks.serve [--clients 200] [--seconds 60] [--replicas 2] [--stream 0.25]

The clients continue until the new version of the alias has answered. Each client sends its next request after an answer, some as
streams. Prints the answers by status and version, the lost ones (a broken connection, an incomplete answer), and the latencies.
"""

import asyncio
import collections
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from tests.benchmarks import harness
from tests.integration.endpoint import KEY, NAME, Endpoint, serving

LOADS_S = 120.0  # behind the end, for the second version to load on a busy machine


class Load:
    """Records the answers that the clients get."""

    def __init__(self, url: str, streamed: float) -> None:
        self.url, self.streamed = f"{url}/v1/completions", streamed
        self.by: collections.Counter[tuple[str, str]] = collections.Counter()
        self.lost: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.began, self.took = time.monotonic(), 0.0

    @property
    def moved(self) -> bool:
        """Returns whether the version to which the alias has moved has answered."""
        return any(what == f"{NAME}-2" for _, what in self.by)

    async def client(self, session: aiohttp.ClientSession, number: int, end: float) -> None:
        drawn = random.Random(number)
        while time.monotonic() < end or (time.monotonic() < end + LOADS_S and not self.moved):
            began, stream = time.monotonic(), drawn.random() < self.streamed
            asked = {
                "model": NAME,
                "prompt": "word " * drawn.randrange(1, 20),
                "max_tokens": 16,
                "seed": number,
                "stream": stream,
            }
            try:
                async with session.post(self.url, json=asked) as answer:
                    told = await answer.read()
                self.read(answer.status, told, stream and answer.status == 200)
                self.seconds.append(time.monotonic() - began)
            except (aiohttp.ClientError, TimeoutError) as e:
                self.lost[type(e).__name__] += 1

    def read(self, status: int, told: bytes, stream: bool) -> None:
        if not stream:
            body = json.loads(told)
            whole = body["choices"][0]["finish_reason"] if status == 200 else body["error"]["message"]
            self.by[str(status), body.get("system_fingerprint", whole)] += 1
            return
        events = [part.removeprefix(b"data: ") for part in told.split(b"\n\n") if part]
        if events[-1] == b"[DONE]":
            self.by["200 stream", json.loads(events[0])["system_fingerprint"]] += 1
        elif b'"error"' in events[-1]:
            self.by["200 stream", f"error event: {json.loads(events[-1])['error']['code']}"] += 1
        else:
            self.lost["a stream without an end"] += 1


async def disturb(endpoint: Endpoint, seconds: float) -> None:
    await asyncio.sleep(seconds / 3)
    victim = endpoint.replicas(1)[0]
    victim.kill()
    print(f"{seconds / 3:.0f} s: replica {victim.pid} killed")
    await asyncio.sleep(seconds / 3)
    await asyncio.to_thread(endpoint.move, 2)
    print(f"{seconds * 2 / 3:.0f} s: alias moved")


async def run(endpoint: Endpoint, clients: int, seconds: float, streamed: float) -> Load:
    load, end = Load(endpoint.url, streamed), time.monotonic() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}, connector=connector) as session:
        await asyncio.gather(disturb(endpoint, seconds), *(load.client(session, number, end) for number in range(clients)))
    load.took = time.monotonic() - load.began
    return load


def main() -> None:
    given = harness.arguments(__doc__, clients=200, seconds=60.0, replicas=2, stream=0.25)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), "--replicas", str(given.replicas), "--batch", "64") as endpoint,
    ):
        load = asyncio.run(run(endpoint, given.clients, given.seconds, given.stream))
    for (status, what), count in sorted(load.by.items()):
        print(f"{count:6d}  {status:10s}  {what}")
    print(f"{sum(load.lost.values()):6d}  lost  {dict(load.lost) or ''}")
    cuts = statistics.quantiles(load.seconds, n=100)
    print(f"{len(load.seconds) / load.took:.1f} answers a second; p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s")


if __name__ == "__main__":
    main()
