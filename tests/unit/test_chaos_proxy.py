"""Tests the fault proxy: without a fault, every byte passes unchanged. Faults follow their rate, a seed, and their limits."""

import itertools
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest
from heliostat.chaos.proxy import FaultProxy, ProxyFault

from tests.waiting import until


class Store(socketserver.ThreadingTCPServer):
    """Records every request unchanged, and answers with `answer`."""

    daemon_threads = True
    patient = True
    answer = b"HTTP/1.1 200 OK\r\ncontent-LENGTH:  5\r\nX-a: b\r\n\r\nhello"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[bytes] = []


class Handler(socketserver.StreamRequestHandler):
    server: Store

    def handle(self) -> None:
        while head := self.until(b"\r\n"):
            body, lower = b"", head.lower()
            if b"transfer-encoding: chunked" in lower:
                body = self.until(b"0\r\n") + b"0\r\n" + self.rfile.readline()
            elif b"content-length:" in lower:
                body = self.rfile.read(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
            self.server.got.append(head + b"\r\n" + body)
            self.wfile.write((b"HTTP/1.1 100 Continue\r\n\r\n" if b"expect" in lower else b"") + self.server.answer)
            if not self.server.patient:
                return

    def until(self, last: bytes) -> bytes:
        """Reads the lines before this one, or up to the end of the connection."""
        return b"".join(itertools.takewhile(lambda line: line not in (b"", last), iter(self.rfile.readline, None)))


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def connect(proxy: FaultProxy) -> socket.socket:
    host, port = proxy.endpoint.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read(client: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size and (piece := client.recv(size - len(got))):
        got += piece
    return got


def read_all(client: socket.socket) -> bytes:
    """Reads up to the end of the connection."""
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def some_request(rng: random.Random) -> bytes:
    """Returns a request like those of S3 clients, with unusual spelling that a signature would cover."""
    path = "/" + "".join(rng.choice(["a", "%20", "/", "%2F", "+", "~", "é"]) for _ in range(rng.randrange(1, 12)))
    head = f"{rng.choice(['GET', 'PUT', 'POST', 'HEAD', 'DELETE'])} {path}?uploadId=x%3D&partNumber=1 HTTP/1.1\r\n"
    head += (
        f"Host: bucket.example:9\r\nx-AMZ-date:  2020 \r\nAuthorization: AWS4 a,b;c={rng.random()}\r\nX-Two: 1\r\nx-two: 2\r\n"
    )
    body = rng.randbytes(rng.randrange(1, 200_000)).replace(b"\n", b"?")
    if rng.random() < 0.4:
        cut = rng.randrange(len(body))
        parts = [p for p in (body[:cut], body[cut:]) if p]
        body = b"".join(b"%x;chunk-signature=0\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"
        head += "Transfer-Encoding: chunked\r\nx-amz-decoded-content-length: 7\r\n"
    elif rng.random() < 0.7:
        head += f"content-length: {len(body)}\r\n"
    else:
        body = b""
    return head.encode() + b"\r\n" + body


@pytest.mark.parametrize("seed", range(5))
def test_requests_and_answers_pass_byte_for_byte(store, seed):
    """The spelling, order, Host, and framing of a connection's requests reach the store unchanged, and so do the answers."""
    rng = random.Random(seed)
    sent = [some_request(rng).replace(b"HEAD", b"GET") for _ in range(8)]
    with FaultProxy("{}:{}".format(*store.server_address)) as proxy, connect(proxy) as client:
        for request in sent:
            client.sendall(request)
            assert read(client, len(store.answer)) == store.answer
        assert store.got == sent and proxy.requests == 8 and not proxy.injected


def test_a_store_that_ends_idle_connections_is_no_fault(store):
    """Each request is answered, although the store closes its connection after every answer without notice."""
    store.patient = False
    with FaultProxy("{}:{}".format(*store.server_address)) as proxy, connect(proxy) as client:
        for _ in range(4):
            client.sendall(b"GET /k HTTP/1.1\r\n\r\n")
            assert read(client, len(store.answer)) == store.answer
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "method"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nx-trailer: 1\r\n\r\n", "GET"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", "HEAD"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "DELETE"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", "GET"),
    ],
)
def test_answers_of_every_framing_end_where_they_end(store, answer, method):
    """Chunked, without a body, of HEAD, closing: the whole answer arrives, and the next request doesn't wait for it."""
    store.answer = answer
    with FaultProxy("{}:{}".format(*store.server_address)) as proxy, connect(proxy) as client:
        client.sendall(f"{method} / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        assert read_all(client) == answer


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(store):
    """The proxy answers Expect: 100-continue before the body arrives. The store's own 100 doesn't reach the client as well."""
    with FaultProxy("{}:{}".format(*store.server_address)) as proxy, connect(proxy) as client:
        client.sendall(b"PUT /k HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\n")
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert read_all(client) == store.answer and store.got[0].endswith(b"\r\n\r\nabc")


def ask(proxy: FaultProxy, request: bytes = b"GET /k HTTP/1.1\r\nConnection: close\r\n\r\n") -> bytes:
    with connect(proxy) as client:
        client.sendall(request)
        return read_all(client)


def test_each_fault_is_what_it_says(store):
    """A status without a request to the store, half a body, a reset after the store has acted, half an upload. Then everything
    works again."""
    with FaultProxy("{}:{}".format(*store.server_address)) as proxy:
        proxy.faults = (ProxyFault("status", status=503, code="SlowDown"),)
        answer = ask(proxy, b"PUT /k HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcHEAD /k HTTP/1.1\r\nConnection: close\r\n\r\n")
        first, second = answer.split(b"</Error>")
        assert first.startswith(b"HTTP/1.1 503 ") and b"<Code>SlowDown</Code>" in first and store.got == []
        assert second.startswith(b"HTTP/1.1 503 ") and second.endswith(b"\r\n\r\n")
        proxy.faults = (ProxyFault("cut"),)
        assert ask(proxy) == store.answer[:-3] and len(store.got) == 1
        proxy.faults = (ProxyFault("reset"),)
        with pytest.raises(ConnectionResetError):
            ask(proxy)
        assert len(store.got) == 2
        proxy.faults = (ProxyFault("cut"),)
        with pytest.raises(ConnectionResetError):
            ask(proxy, b"PUT /k HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + bytes(100_000))
        proxy.faults = (ProxyFault("delay", seconds=0.2),)
        assert ask(proxy) == store.answer
        proxy.faults = ()
        assert ask(proxy) == store.answer
        assert {f.kind: n for f, n in proxy.injected.items()} == {"status": 2, "cut": 2, "reset": 1, "delay": 1}


def test_nothing_outlives_the_proxy(store):
    """The end of the proxy doesn't wait for a current delay, or for connected clients: it breaks their connections."""
    start = time.monotonic()
    with FaultProxy("{}:{}".format(*store.server_address)) as proxy:
        idle, delayed = connect(proxy), connect(proxy)
        idle.sendall(b"GET /k HTTP/1.1\r\n\r\n")
        assert read(idle, len(store.answer)) == store.answer
        proxy.faults = (ProxyFault("delay", seconds=3600),)
        delayed.sendall(b"GET /k HTTP/1.1\r\n\r\n")
        until(lambda: proxy.injected, "delay")
    with idle, delayed:
        assert idle.recv(1000) == b"" and delayed.recv(1000) == b""
    assert time.monotonic() - start < 300


def drawn(seed: int, faults: list[ProxyFault], n: int = 4000, path: str = "/b/k") -> list[str | None]:
    proxy = FaultProxy("h:1", faults, seed)
    found = [proxy.draw(path) for _ in range(n)]
    assert sum(proxy.injected.values()) == sum(f is not None for f in found) and proxy.requests == n
    return [f.kind if f else None for f in found]


def test_faults_come_at_their_rate_from_the_seed():
    """The same seed draws the same faults, another seed others. Rates hold, and if two faults hit, the first counts."""
    plan = [ProxyFault("status", rate=0.3), ProxyFault("reset", rate=0.5)]
    first = drawn(1, plan)
    assert first == drawn(1, plan) != drawn(2, plan)
    assert first.count("status") == pytest.approx(0.3 * 4000, rel=0.1)
    assert first.count("reset") == pytest.approx(0.7 * 0.5 * 4000, rel=0.1)
    assert set(drawn(1, [ProxyFault("cut", rate=1.0)])) == {"cut"} and set(drawn(1, [ProxyFault("cut", rate=0.0)])) == {None}


def test_a_limit_ends_a_fault_and_moves_no_other():
    """After its limit, a fault doesn't come again. The other faults come at the same requests as without the limit."""
    plain = drawn(3, [ProxyFault("status", rate=0.3), ProxyFault("reset", rate=0.2)])
    limited = drawn(3, [ProxyFault("status", rate=0.3, limit=5), ProxyFault("reset", rate=0.2)])
    assert limited.count("status") == 5 and limited.count("reset") > plain.count("reset")
    assert all(b == "reset" for a, b in zip(plain, limited, strict=True) if a == "reset")


def test_a_key_pattern_spares_the_other_keys():
    """Only paths that match get the fault."""
    fault = ProxyFault("status", key="/bucket/*/shards/*.parquet")
    assert set(drawn(0, [fault], 10, "/bucket/a/shards/00001.parquet")) == {"status"}
    assert set(drawn(0, [fault], 10, "/bucket/a/manifest.parquet")) == {None}
