"""Runs a proxy between an S3 server and its clients. The proxy injects the faults of an overloaded or broken store.

Invariants: the proxy forwards a request or an answer without a fault unchanged, including the client's Host header. So signatures
stay valid. Each request gets at most one fault. A seeded generator draws this fault by the faults' rates. The proxy counts the
faults that it injects.

`faults` may be replaced at any time. Requests that have begun keep the fault that was drawn for them.

The connections to clients and to the store use plain HTTP/1.1. So the proxy works with a store that you run, but not with a
cloud's TLS endpoint.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import BinaryIO, Literal
from urllib.parse import unquote

BLOCK = 1 << 16
ANSWER_S = 300.0  # maximum seconds to wait for a byte from the store or the client


@dataclass(frozen=True)
class ProxyFault:
    """Describes a fault. `key`: a pattern (`*` and `?`) for `/bucket/key`. `limit`: the maximum number of times that the proxy
    injects this fault.

    status: the request doesn't reach the store; the answer has `status` and an S3 error with that `code`
    delay:  the request reaches the store `seconds` late
    reset:  the store executes the request, but the connection breaks before its answer arrives
    cut:    half of the request's body reaches the store; without a body, half of the answer's body reaches the client
    """

    kind: Literal["status", "delay", "reset", "cut"]
    rate: float = 1.0
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0
    key: str = "*"
    limit: int | None = None


@dataclass(frozen=True)
class HttpHead:
    """Holds the head of a request or an answer: the received bytes, and the headers that define the framing of the body."""

    raw: bytes
    start: list[str]  # the first line's three words
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def length(self) -> int | None:
        return int(self.headers["content-length"]) if "content-length" in self.headers else None

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class FaultProxy:
    """Runs a proxy that injects faults while its context lasts.

    `with FaultProxy("127.0.0.1:9000", [Fault("status", rate=0.3)]) as proxy:` clients then use `proxy.endpoint`.
    """

    def __init__(self, upstream: str, faults: Sequence[ProxyFault] = (), seed: int = 0) -> None:
        host, _, port = upstream.rpartition(":")
        self.upstream = (host, int(port))
        self.faults = tuple(faults)
        self.injected: Counter[ProxyFault] = Counter()
        self.requests = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._open: set[socket.socket] = set()

    @property
    def endpoint(self) -> str:
        host, port = self._server.socket.getsockname()
        return f"{host}:{port}"

    def __enter__(self) -> FaultProxy:
        self._server = _Server(("127.0.0.1", 0), _Connection)
        self._server.proxy = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fault-proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in tuple(self._open):
            with contextlib.suppress(OSError):  # the connection has ended
                connection.shutdown(socket.SHUT_RDWR)

    def draw(self, path: str) -> ProxyFault | None:
        """Draws the fault for a request; None for no fault.

        Each fault with a matching key uses one random number, so the limit of a fault doesn't change the draws for other faults.
        """
        with self._lock:
            self.requests += 1
            drawn = None
            for fault in self.faults:
                if not fnmatchcase(path, fault.key):
                    continue
                hit = self._random.random() < fault.rate
                spent = fault.limit is not None and self.injected[fault] >= fault.limit
                if hit and not spent and drawn is None:
                    drawn = fault
            if drawn:
                self.injected[drawn] += 1
            return drawn

    def ended_within(self, seconds: float) -> bool:
        """Waits `seconds`, or until the proxy ends; returns whether the proxy ended."""
        return self._stopped.wait(seconds)

    @contextlib.contextmanager
    def serving(self, connection: socket.socket) -> Iterator[None]:
        """Registers a connection for the duration of the context. If the proxy ends within the context, the proxy breaks the
        connection."""
        self._open.add(connection)
        try:
            yield
        finally:
            self._open.discard(connection)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False  # a client may keep its connection open forever
    request_queue_size = 128
    proxy: FaultProxy


class _Connection(socketserver.BaseRequestHandler):
    """Serves one client's connection: forwards its requests, one after another, over one connection to the store.

    If the store has closed its connection, opens a new connection to the store.
    """

    server: _Server

    def handle(self) -> None:
        proxy, client = self.server.proxy, self.request
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:  # one side hung up: close both
            stack.enter_context(proxy.serving(client))
            from_client = stack.enter_context(buffered(client))
            upstream = from_store = None
            while request := read_message(from_client):
                if upstream is None or from_store is None or select.select([upstream], [], [], 0)[0]:  # none, or closed
                    upstream = stack.enter_context(socket.create_connection(proxy.upstream, timeout=ANSWER_S))
                    from_store = stack.enter_context(buffered(upstream))
                fault = proxy.draw(unquote(request.start[1].partition("?")[0]))
                if request.headers.get("expect", "").lower() == "100-continue":
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")  # instead of the store's own
                if not self._exchange(request, fault, from_client, from_store, upstream):
                    return

    def _exchange(
        self, request: HttpHead, fault: ProxyFault | None, from_client: BinaryIO, from_store: BinaryIO, upstream: socket.socket
    ) -> bool:
        """Forwards one request and its answer, with the fault; returns False if the connection ends afterwards."""
        kind, client = fault.kind if fault else None, self.request
        body = request_body(request, from_client)
        if fault and kind == "status":
            for _ in body:
                pass
            client.sendall(error_answer(fault, request.start[0]))
            return not request.closes
        if fault and kind == "delay" and self.server.proxy.ended_within(fault.seconds):
            return False
        upstream.sendall(request.raw)
        if kind == "cut" and (request.length or request.chunked):
            for piece in half(body, request.length):
                upstream.sendall(piece)
            reset(upstream)
            reset(client)
            return False
        for piece in body:
            upstream.sendall(piece)
        answer = read_message(from_store)
        while answer and answer.start[1].startswith("1"):
            answer = read_message(from_store)
        if answer is None or kind == "reset":
            reset(client)
            return False
        client.sendall(answer.raw)
        pieces = answer_body(answer, request.start[0], from_store)
        for piece in half(pieces, answer.length) if kind == "cut" else pieces:
            client.sendall(piece)
        return kind != "cut" and not (request.closes or answer.closes)


def buffered(connection: socket.socket) -> BinaryIO:
    connection.settimeout(ANSWER_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection.makefile("rb")


def read_message(source: BinaryIO) -> HttpHead | None:
    """Reads the head of the next message; None at the end of the connection."""
    lines = []
    while (line := source.readline(BLOCK)) not in (b"\r\n", b""):
        lines.append(line)
    if not lines or not line:
        return None
    fields = (text.partition(":") for text in (h.decode("latin-1") for h in lines[1:]))
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    return HttpHead(b"".join([*lines, line]), lines[0].decode("latin-1").split(" ", 2), headers)


def request_body(request: HttpHead, source: BinaryIO) -> Iterator[bytes]:
    return chunks(source) if request.chunked else exactly(source, request.length or 0)


def answer_body(answer: HttpHead, method: str, source: BinaryIO) -> Iterator[bytes]:
    if method == "HEAD" or answer.start[1] in ("204", "304"):
        return iter(())
    if answer.chunked:
        return chunks(source)
    return exactly(source, answer.length)


def exactly(source: BinaryIO, length: int | None) -> Iterator[bytes]:
    """Yields `length` bytes in pieces. Raises ConnectionError if the connection has fewer bytes. If `length` is None, yields all
    bytes of the connection."""
    left = length
    while left is None or left > 0:
        piece = source.read1(BLOCK if left is None else min(BLOCK, left))  # type: ignore[attr-defined]
        if not piece:
            if left:
                raise ConnectionError(f"the peer closed the connection before the last {left} bytes")
            return
        left = None if left is None else left - len(piece)
        yield piece


def chunks(source: BinaryIO) -> Iterator[bytes]:
    """Yields the raw bytes of a chunked body, up to the empty line after the last chunk and its trailers."""
    while True:
        line = source.readline(BLOCK)
        yield line
        size = int(line.partition(b";")[0], 16)
        if not size:
            break
        yield from exactly(source, size + 2)
    while line := source.readline(BLOCK):
        yield line
        if line == b"\r\n":
            return


def half(pieces: Iterator[bytes], length: int | None) -> Iterator[bytes]:
    """Yields about half of a body of `length` bytes. For a body of unknown length, yields the first piece."""
    left = (length or 0) // 2
    for piece in pieces:
        yield piece[:left] if length else piece
        left -= len(piece)
        if left <= 0:
            return


def reset(connection: socket.socket) -> None:
    """Resets a connection, as a crash would do, instead of closing it properly."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()


def error_answer(fault: ProxyFault, method: str) -> bytes:
    """Builds an S3 error response in XML; for the method HEAD, without a body."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{fault.code}</Code><Message>injected</Message></Error>'.encode()
    head = f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)
