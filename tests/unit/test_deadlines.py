"""Tests that the server closes connections whose clients send too slowly or without end, and keeps those that send a request and
wait."""

import asyncio
import contextlib
import heapq
import http.client
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from heliostat.apps.play.app import Server
from heliostat.apps.serve.front import Front
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.cluster.processes import free_port
from heliostat.web import deadlines
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

HEAD = b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
STEP = 1 / 8  # of a period


class SkippingLoop(asyncio.SelectorEventLoop):
    """Provides an event loop whose clock can be advanced. Like uvloop, it runs its timers before it reads."""

    skipped = 0.0

    def time(self) -> float:
        return super().time() + self.skipped

    def _process_events(self, event_list: Any) -> None:
        loop: Any = self
        while loop._scheduled and loop._scheduled[0]._when <= self.time():
            timer = heapq.heappop(loop._scheduled)
            timer._scheduled = False
            if timer._cancelled:
                loop._timer_cancelled_count -= 1
            else:
                loop._ready.append(timer)
        super()._process_events(event_list)  # type: ignore[misc]


class Site:
    """Runs a server in a thread. The test controls the clock of its loop."""

    def __init__(self, http: str) -> None:
        self.loop, self.port = SkippingLoop(), free_port()
        self.busy, self.go_on = threading.Event(), threading.Event()
        ready = threading.Event()
        routes = [Route(f"/{one.__name__}", one) for one in (self.slow, self.keeps_the_loop)]
        routes += [Route(f"/{one.__name__}", one, methods=["POST"]) for one in (self.body, self.refused, self.waited)]
        config = uvicorn.Config(
            Starlette(routes=routes), port=self.port, log_config=None, lifespan="off", http=http, timeout_keep_alive=3600
        )
        self.server = Server(config, ready.set)
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self.server.serve(),), daemon=True)
        self.thread.start()
        assert ready.wait(60)

    async def slow(self, request: Request) -> PlainTextResponse:
        await asyncio.sleep(4 * deadlines.PERIOD_S)
        return PlainTextResponse("answered")

    async def refused(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("refused", 401)

    async def waited(self, request: Request) -> PlainTextResponse:
        await asyncio.sleep(4 * deadlines.PERIOD_S)
        return await self.body(request)

    async def keeps_the_loop(self, request: Request) -> PlainTextResponse:
        self.busy.set()
        self.go_on.wait(60)
        self.loop.skipped += 3 * deadlines.PERIOD_S
        return PlainTextResponse("answered")

    async def body(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    def passes(self, periods: float) -> None:
        """Advances the time in steps, after each of which the loop does its pending work."""

        async def step() -> None:
            self.loop.skipped += STEP * deadlines.PERIOD_S
            for _ in range(20):
                await asyncio.sleep(0)

        for _ in range(round(periods / STEP)):
            asyncio.run_coroutine_threadsafe(step(), self.loop).result(60)

    def until_answer(self, one: socket.socket) -> None:
        """Advances the time until there is something to read."""
        for _ in range(100):
            self.passes(STEP)
            if select.select([one], [], [], 0.01)[0]:
                return
        raise TimeoutError("no answer, and no end of the connection")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def until_closed(self, sent: bytes, drop: bytes, periods: float) -> None:
        """Sends `drop` repeatedly, with so many periods between; TimeoutError if the server doesn't close the connection."""
        with self.connect() as one, contextlib.suppress(ConnectionError):
            one.sendall(sent)
            for _ in range(100):
                if select.select([one], [], [], 0.01)[0] and one.recv(100) == b"":
                    return
                one.sendall(drop)
                self.passes(periods)
            raise TimeoutError


@pytest.fixture(params=["h11", "httptools"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    made = Site(request.param)
    yield made
    made.server.should_exit = True
    made.loop.skipped += 1
    made.loop.call_soon_threadsafe(lambda: None)
    made.thread.join(30)
    made.loop.close()


@pytest.mark.parametrize(
    ("sent", "drop"),
    [(b"", b""), (b"GET /slow HT", b""), (b"GET /slow HTTP/1.1\r\nX-A: ", b"a"), (b"GET /slow HTTP/1.1\r\n", b"X-A: a\r\n"),
     (HEAD + b"\r\n", b""), (HEAD + b"\r\n", b"a"), (HEAD + b"Expect: 100-continue\r\n\r\n", b"a")],
)  # fmt: skip
def test_a_request_that_comes_too_slowly_is_closed(site, sent, drop):
    site.until_closed(sent, drop, STEP)


@pytest.mark.parametrize(
    "sent",
    [b"GET /slow HTTP/1.1\r\n",
     b"POST /refused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\naGET / HTTP/1.1\r\n"],
    ids=["at once", "behind a refused body"],
)  # fmt: skip
def test_headers_without_end_are_closed_at_once(site, sent):
    site.until_closed(sent, b"X-A: " + b"a" * 4000 + b"\r\n", 0)


STEADY_BYTES = 20 * deadlines.LEAST_BYTES


def steady(site):
    """Sends a body that takes two and a half periods."""
    for _ in range(10):
        yield b"a" * (STEADY_BYTES // 10)
        site.passes(1 / 4)


def test_a_slow_answer_a_steady_body_and_many_requests_of_one_connection_are_answered(site):
    one = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    for _ in range(2):
        one.request("GET", "/slow")
        site.until_answer(one.sock)
        assert one.getresponse().read() == b"answered"

    one.request("POST", "/body", body=steady(site), headers={"Content-Length": str(STEADY_BYTES)})
    assert one.getresponse().read() == b"%d" % STEADY_BYTES
    site.passes(4)  # idle, as clients keep connections
    for _ in range(20):
        one.request("POST", "/body", body=b"a")
        assert one.getresponse().read() == b"1"
        site.passes(1 / 8)


def test_a_large_body_that_is_refused_before_its_end_gets_the_answer(site):
    one = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    for size, body in ((20_000_000, b"a" * 20_000_000), (1000, b"a" * 1000), (STEADY_BYTES, steady(site))):
        one.request("POST", "/refused", body=body, headers={"Content-Length": str(size)})
        assert one.getresponse().read() == b"refused"


def test_a_client_that_sends_no_body_before_it_is_asked_for_is_not_slow(site):
    with site.connect() as one:
        one.sendall(b"POST /waited HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        site.until_answer(one)
        assert one.recv(100).startswith(b"HTTP/1.1 100 ")
        one.sendall(b"aaaa")
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_request_that_came_while_the_server_was_busy_is_answered(site):
    with site.connect() as one, site.connect() as other:
        one.sendall(b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n")
        site.passes(1 / 4)
        other.sendall(b"GET /keeps_the_loop HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert site.busy.wait(60)
        one.sendall(b"\r\naaaa")
        site.go_on.set()
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_does_not_end_is_refused_and_holds_no_place_of_its_key():
    settings = FrontSettings("m", "text", None, 0, None, 1 << 20, 16, 1, 0, 0.2)
    front = Front(settings, None, ())

    async def receive():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"a", "more_body": True}

    asked = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"", "server": ("x", 1)}
    for _ in range(2):
        response = asyncio.run(front(Request(asked, receive)))
        assert response.status_code == 408 and b"the request's body didn't arrive within 0.2 s" in response.body
