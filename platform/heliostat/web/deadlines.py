"""Closes connections whose clients send headers or bodies too slowly, or send headers without end.

uvicorn limits only the time between a response and the next request. `apply` adds the other limits to every server of this
process. This includes Ray Serve and MLflow, which start uvicorn themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

PERIOD_S = 10.0  # seconds between two checks of a connection; a request without progress ends within two periods
AGAIN = 0.1  # after this share of a period, a slow connection is checked again; if it is still slow, it is closed
HEAD_BYTES = 64 << 10  # maximum bytes of the request line and headers
LEAST_BYTES = 10 << 10  # minimum bytes of a body per period


def apply() -> None:
    """Installs a ConnectionWatch, with time and size limits, for every connection that uvicorn accepts in this process from now
    on."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    kinds: list[Any] = [H11Protocol]
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:  # without httptools, uvicorn uses h11
        pass
    else:
        kinds.append(HttpToolsProtocol)
    for kind in kinds:
        if not hasattr(kind, "heliostat_watched"):
            kind.heliostat_watched = True
            kind.connection_made = _watching(kind.connection_made)
            kind.data_received = _counting(kind.data_received)


class ConnectionWatch:
    """Watches one HTTP connection, and closes the connection if the client is too slow. Counts the received bytes, and remembers
    the state at the last check."""

    def __init__(self, protocol: Any) -> None:
        self.protocol, self.seen = protocol, protocol.cycle
        self.head = self.arrived = self.before = self.end = 0
        self.loop = asyncio.get_running_loop()
        self.began: float | None = self.loop.time()  # time when the client began to send headers, or could have begun
        self.doubted = False  # whether the connection was slow at the last check
        self.timer = self.loop.call_later(PERIOD_S, self.check)

    def took(self, size: int, new: bool) -> None:
        """Counts received bytes, and closes the connection if the headers are too long. `new`: whether a new request began."""
        if new:
            self.end = self.arrived + _body_bytes(self.protocol.cycle.scope)  # earliest end of the request's body
        self.arrived += size
        if new or not self.asking or self.finishing:
            self.head, self.began = 0, None
            return
        self.head, self.began = self.head + min(size, self.arrived - self.end), self.began or self.loop.time()
        if self.head > HEAD_BYTES:
            self.close()

    @property
    def asking(self) -> bool:
        """Checks whether the server waits for a request: no request has arrived yet, or the response to the last request is
        complete."""
        return self.protocol.cycle is None or self.protocol.cycle.response_complete

    @property
    def finishing(self) -> bool:
        """Checks whether the client is still sending a body although the server has already responded, for example with an error
        because the API key is missing.

        Such a client reads the response only after the complete body is sent. If the server closed the connection earlier, the
        client would never see the response.
        """
        return self.arrived < self.end

    def check(self) -> None:
        """Closes the connection if the headers take longer than PERIOD_S seconds, or if fewer than LEAST_BYTES bytes of a body
        have arrived since the last check.

        Checks a slow connection twice, because a busy event loop runs timers before it reads received bytes. uvicorn itself
        limits the time between a response and the next request.
        """
        now, transport = self.protocol.cycle, self.protocol.transport
        if transport.is_closing() or transport.get_protocol() is not self.protocol:  # it ended, or its protocol changed
            return
        if self.asking and not self.finishing:
            slow = self.began is not None and self.loop.time() - self.began >= PERIOD_S
        else:
            wants_body = now.more_body and not now.waiting_for_100_continue and not self.protocol.flow.read_paused
            slow = (self.asking or wants_body) and now is self.seen and self.arrived - self.before < LEAST_BYTES
        if slow and self.doubted:
            self.close()
            return
        self.doubted = slow
        if slow:
            self.timer = self.loop.call_later(AGAIN * PERIOD_S, self.check)
            return
        self.seen, self.before = now, self.arrived
        self.timer = self.loop.call_later(PERIOD_S, self.check)

    def close(self) -> None:
        """Closes the connection immediately, without a response."""
        self.timer.cancel()
        self.protocol.transport.abort()


def _body_bytes(scope: Mapping[str, Iterable[tuple[bytes, bytes]]]) -> int:
    """Returns the Content-Length of a request; 0 if the request has no such header, or if the body is chunked."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    return int(length) if length.isdigit() and b"transfer-encoding" not in headers else 0


def _watching(method: Callable[..., None]) -> Callable[..., None]:
    @wraps(method)
    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        method(self, transport)
        self.heliostat_watch = ConnectionWatch(self)

    return connection_made


def _counting(received: Callable[..., None]) -> Callable[..., None]:
    @wraps(received)
    def data_received(self: Any, data: bytes) -> None:
        before = self.cycle
        received(self, data)
        self.heliostat_watch.took(len(data), new=self.cycle is not before)

    return data_received
