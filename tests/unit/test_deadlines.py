"""Connections whose clients ask too slowly, or without end, are closed; those that ask and wait are not."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time

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

PERIOD_S = 0.4
HEAD = b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"


async def slow(request: Request) -> PlainTextResponse:
    await asyncio.sleep(4 * PERIOD_S)
    return PlainTextResponse("answered")


async def refused(request: Request) -> PlainTextResponse:
    return PlainTextResponse("refused", 401)


async def waited(request: Request) -> PlainTextResponse:
    await asyncio.sleep(4 * PERIOD_S)
    return await body(request)


async def busy(request: Request) -> PlainTextResponse:
    time.sleep(3 * PERIOD_S)  # the loop stands still
    return PlainTextResponse("answered")


async def body(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture(params=["h11", "httptools"])
def port(request, monkeypatch):
    monkeypatch.setattr(deadlines, "PERIOD_S", PERIOD_S)
    monkeypatch.setattr(deadlines, "LEAST_BYTES", 1000)
    posts = [Route(f"/{one.__name__}", one, methods=["POST"]) for one in (body, refused, waited)]
    app = Starlette(routes=[Route("/slow", slow), Route("/busy", busy), *posts])
    place, ready = free_port(), threading.Event()
    config = uvicorn.Config(app, port=place, log_config=None, lifespan="off", http=request.param, timeout_keep_alive=60)
    server = Server(config, ready.set)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield place
    server.should_exit = True
    thread.join(30)


def closed_after(port: int, sent: bytes, drop: bytes = b"", every: float = 0.05) -> float:
    """How long a connection lives on which `drop` is sent again and again; TimeoutError if it is not closed."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=every) as one:
        one.sendall(sent)
        while time.monotonic() < began + 20:
            with contextlib.suppress(TimeoutError):
                if one.recv(1) == b"":
                    return time.monotonic() - began
            try:
                one.sendall(drop)
            except OSError:
                return time.monotonic() - began
    raise TimeoutError


@pytest.mark.parametrize(
    ("sent", "drop"),
    [(b"", b""), (b"GET /slow HT", b""), (b"GET /slow HTTP/1.1\r\nX-A: ", b"a"), (b"GET /slow HTTP/1.1\r\n", b"X-A: a\r\n"),
     (HEAD + b"\r\n", b""), (HEAD + b"\r\n", b"a"), (HEAD + b"Expect: 100-continue\r\n\r\n", b"a")],
)  # fmt: skip
def test_a_request_that_comes_too_slowly_is_closed(port, sent, drop):
    with contextlib.suppress(ConnectionResetError):
        closed_after(port, sent, drop)


def test_headers_without_end_are_closed_at_once(port, monkeypatch):
    monkeypatch.setattr(deadlines, "PERIOD_S", 60.0)
    with contextlib.suppress(ConnectionResetError):
        closed_after(port, b"GET /slow HTTP/1.1\r\n", b"X-A: " + b"a" * 4000 + b"\r\n", every=0.001)


def test_a_slow_answer_a_steady_body_and_many_requests_of_one_connection_are_answered(port):
    one = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(2):
        one.request("GET", "/slow")
        assert one.getresponse().read() == b"answered"

    def steady():
        for _ in range(10):
            yield b"a" * 2000
            time.sleep(PERIOD_S / 4)

    one.request("POST", "/body", body=steady(), headers={"Content-Length": "20000"})
    assert one.getresponse().read() == b"20000"
    time.sleep(4 * PERIOD_S)  # idle, as clients keep connections
    for _ in range(20):
        one.request("POST", "/body", body=b"a")
        assert one.getresponse().read() == b"1"
        time.sleep(PERIOD_S / 8)


def test_a_large_body_that_is_refused_before_its_end_gets_the_answer(port, monkeypatch):
    monkeypatch.setattr(deadlines, "PERIOD_S", 10.0)
    one = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for size in (20_000_000, 1000):
        one.request("POST", "/refused", body=b"a" * size)
        assert one.getresponse().read() == b"refused"


def test_headers_behind_a_refused_body_are_bounded_too(port):
    sent = b"POST /refused HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\naGET / HTTP/1.1\r\n"
    with contextlib.suppress(ConnectionResetError):
        closed_after(port, sent, b"X-A: " + b"a" * 4000 + b"\r\n", every=0.001)


def test_a_client_that_sends_no_body_before_it_is_asked_for_is_not_slow(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        one.sendall(b"POST /waited HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.1 100 ")
        one.sendall(b"aaaa")
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_request_that_came_while_the_server_was_busy_is_answered(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        one.sendall(b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n")
        time.sleep(PERIOD_S / 4)
        busy = threading.Thread(target=lambda: http.client.HTTPConnection("127.0.0.1", port).request("GET", "/busy"))
        busy.start()
        time.sleep(PERIOD_S / 4)
        one.sendall(b"\r\naaaa")
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")
        busy.join()


def test_a_body_that_does_not_end_is_refused_and_holds_no_place_of_its_key():
    settings = FrontSettings("m", "text", None, 0, None, 1 << 20, 16, 1, 0, 0.2)
    front = Front(settings, None, ())

    async def receive():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"a", "more_body": True}

    asked = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b"", "server": ("x", 1)}
    for _ in range(2):
        response = asyncio.run(front(Request(asked, receive)))
        assert response.status_code == 408 and b"did not come within 0.2 s" in response.body
