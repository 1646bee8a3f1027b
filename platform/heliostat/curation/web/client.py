"""Gets one URL over HTTP: within a number of bytes and seconds, from a public address, whatever the server or its redirects do.

A name is resolved once, its addresses are checked, and the connection is made to one that was checked, so that no answer of a
name server can lead to another. Proxies of the environment are not used. Bodies come as they are: no compression is asked for.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import string
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

REDIRECTS = 5
BLOCK = 1 << 16
PORTS = {"http": 80, "https": 443}
CONTROL = re.compile(r"[\x00-\x20\x7f]")
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


class FetchError(Exception):
    """Reports why a URL gave nothing; `again` tells whether it may, a while later, after `wait` seconds at least."""

    def __init__(self, reason: str, detail: str = "", again: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.again, self.wait = reason, detail, again, wait


@dataclass(frozen=True)
class Bounds:
    """Holds the limits of a request, its redirects included."""

    bytes: int
    seconds: float
    private: bool = False  # whether addresses that are not public may be asked
    agent: str = "heliostat"


def split(url: str) -> tuple[str, str, int, str]:
    """Returns (scheme, host, port, path with query); FetchError for what is no URL of the web."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise FetchError("bad_url", str(e)) from e
    if parts.scheme not in PORTS or not host or parts.username is not None:
        raise FetchError("bad_url", "no http or https, no host, or a user's name in it")
    path = parts.path or "/"
    try:
        target = quote(f"{path}?{parts.query}" if parts.query else path, safe=string.punctuation)  # what is quoted stays
        host = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError as e:
        raise FetchError("bad_url", "a host's name that is none, or half a surrogate pair") from e
    if CONTROL.search(host):
        raise FetchError("bad_url", "a host's name with white space or a control character in it")
    return parts.scheme, host.lower(), port or PORTS[parts.scheme], target


def get(url: str, bounds: Bounds, before: Callable[[str], object] = lambda _: None) -> bytes:
    """Returns the body that a URL has, behind at most REDIRECTS redirects; FetchError if there is none.

    `before` is called with each URL that is asked, and may wait, which takes nothing of the seconds.
    """
    left = bounds.seconds
    for _ in range(REDIRECTS + 1):
        before(url)
        start = time.monotonic()
        answer = _once(url, bounds, start + left)
        if isinstance(answer, bytes):
            return answer
        left -= time.monotonic() - start
        url = _joined(url, answer)
    raise FetchError("refused", f"more than {REDIRECTS} redirects")


def _joined(url: str, place: str) -> str:
    """Returns the URL that a redirect leads to."""
    try:
        return urljoin(url, place)
    except ValueError as e:
        raise FetchError("bad_url", f"a redirect to {place[:200]!r}: {e}") from e


def _once(url: str, bounds: Bounds, end: float) -> bytes | str:
    """Asks once; returns the body, or where it has gone."""
    scheme, host, port, target = split(url)
    connection = _Connection(host, port, scheme == "https", addresses(host, port, bounds.private), end)
    try:
        headers = {"User-Agent": bounds.agent, "Accept-Encoding": "identity", "Accept": "*/*", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and (place := answer.headers.get("Location")):
            return place
        if answer.status != 200:
            raise _refused(answer)
        return _body(answer, bounds.bytes, end)
    except (TimeoutError, ssl.SSLError, OSError, http.client.HTTPException, ValueError) as e:
        raise FetchError("unreachable", f"{type(e).__name__}: {e}"[:200], again=True) from e
    finally:
        connection.end_all()


def _refused(answer: http.client.HTTPResponse) -> FetchError:
    wait = answer.headers.get("Retry-After", "")
    seconds = float(wait) if wait.isdecimal() else 0.0
    return FetchError("refused", f"HTTP {answer.status}", again=answer.status in TEMPORARY, wait=seconds)


def _body(answer: http.client.HTTPResponse, limit: int, end: float) -> bytes:
    if answer.length is not None and answer.length > limit:
        raise FetchError("too_large", f"{answer.length:,} bytes")
    found = bytearray()
    while block := answer.read1(BLOCK):
        found += block
        if len(found) > limit:
            raise FetchError("too_large", f"more than {limit:,} bytes")
        if time.monotonic() >= end:
            break
    if answer.length or time.monotonic() >= end:
        raise FetchError("unreachable", "the body ended early", again=True)
    return bytes(found)


def addresses(host: str, port: int, private: bool) -> list[Any]:
    """Resolves a host; FetchError if it has no address, or one that is not public while `private` ones are refused."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise FetchError("unreachable", f"no address of {host!r} is known", again=True) from e
    for *_, place in found:
        if not private and not public(str(place[0])):
            raise FetchError("private_address", f"{host} is at {place[0]}")
    return found


def public(address: str) -> bool:
    """Tells whether an address is one of the public internet, and of a single host."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return public(str(inner))
    return found.is_global and not found.is_multicast


class _Connection(http.client.HTTPConnection):
    """Connects to one of the addresses that were checked, and is cut at the end, however slowly an answer drips."""

    def __init__(self, host: str, port: int, secure: bool, found: list[Any], end: float) -> None:
        super().__init__(host, port)
        self.default_port = PORTS["https" if secure else "http"]  # what Host names no port for
        self.secure, self.found, self.end = secure, found, end
        self.timer: threading.Timer | None = None

    def connect(self) -> None:
        fault: OSError = OSError("no address")
        for family, kind, protocol, _, place in self.found:
            sock, left = socket.socket(family, kind, protocol), self.end - time.monotonic()
            try:
                if left <= 0:
                    raise TimeoutError("no more time")
                sock.settimeout(left)
                sock.connect(place)
            except OSError as e:
                sock.close()
                fault = e
                continue
            self.sock = _wrapped(sock, self.host) if self.secure else sock
            self.timer = threading.Timer(max(0.0, self.end - time.monotonic()), _cut, [self.sock])
            self.timer.start()
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.do_handshake()
            return
        raise fault

    def end_all(self) -> None:
        """Closes the connection; `close` is called by http.client too, before the body is read."""
        if self.timer:
            self.timer.cancel()
        self.close()


def _wrapped(sock: socket.socket, host: str) -> ssl.SSLSocket:
    """Makes the socket one of TLS, which takes the connection from it; hands are not shaken yet."""
    return ssl.create_default_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


def _cut(sock: socket.socket) -> None:
    """Ends the connection under a socket, not its TLS: what another thread reads from it stays encrypted."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
