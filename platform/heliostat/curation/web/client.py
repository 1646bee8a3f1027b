"""Fetches one URL over HTTP, within limits of bytes and seconds. By default, connects only to public addresses, even after
redirects.

The client resolves a host's name once, checks the addresses, and connects to one of the checked addresses. So a later DNS answer
can't redirect the request. The client ignores proxies in the environment. It doesn't request compression, so bodies arrive
unchanged.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

REDIRECTS = 5
HEADER = 1 << 16  # maximum bytes of a header
PORTS = {"http": 80, "https": 443}
CONTROL = re.compile(r"[\x00-\x20\x7f]")
TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


# an address as `getaddrinfo` returns it
Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[str | int | bytes, ...]]


class FetchError(Exception):
    """Reports the reason why a URL returned no body. `again`: whether a retry may succeed; `wait`: the minimum seconds before a
    retry."""

    def __init__(self, reason: str, detail: str = "", again: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.again, self.wait = reason, detail, again, wait


@dataclass(frozen=True)
class Bounds:
    """Holds the limits for a request together with all redirects: bytes of the body, seconds, and whether private addresses are
    allowed."""

    bytes: int
    seconds: float
    private: bool = False  # whether requests to addresses that aren't public are allowed
    agent: str = "heliostat"


def split(url: str) -> tuple[str, str, int, str]:
    """Splits a URL into (scheme, host, port, path with query). Raises FetchError if this isn't a valid http or https URL."""
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise FetchError("bad_url", str(e)) from e
    if parts.scheme not in PORTS or not host or parts.username is not None:
        raise FetchError("bad_url", "no http or https, no host, or a user's name in it")
    path = parts.path or "/"
    try:
        target = quote(f"{path}?{parts.query}" if parts.query else path, safe=string.punctuation)  # quoted characters stay quoted
        host = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError as e:
        raise FetchError("bad_url", "a host's name that is none, or half a surrogate pair") from e
    if CONTROL.search(host):
        raise FetchError("bad_url", "a host's name with white space or a control character in it")
    return parts.scheme, host.lower(), port or PORTS[parts.scheme], target


def get(url: str, bounds: Bounds, before: Callable[[str], object] = lambda _: None) -> bytes:
    """Returns the body of a URL, after at most REDIRECTS redirects. Raises FetchError if the request fails.

    Before each request, including redirects, calls `before` with the URL. `before` may wait; the waiting time doesn't count for
    `bounds.seconds`.
    """
    left = bounds.seconds
    for _ in range(REDIRECTS + 1):
        before(url)
        start = time.monotonic()
        answer = _once(url, bounds, start + left)
        if isinstance(answer, bytes):
            return answer
        left -= time.monotonic() - start
        try:
            url = urljoin(url, answer)
        except ValueError as e:
            raise FetchError("bad_url", f"a redirect to {answer[:200]!r}: {e}") from e
    raise FetchError("refused", f"more than {REDIRECTS} redirects")


def _once(url: str, bounds: Bounds, end: float) -> bytes | str:
    """Sends one request. Returns the body (bytes), or the target of a redirect (a string)."""
    scheme, host, port, target = split(url)
    resolved = addresses(host, port, bounds.private)
    try:
        whole = URL(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{target}", encoded=True)
        return asyncio.run(_requested(whole, resolved, bounds, end - time.monotonic()))
    except (aiohttp.ClientError, OSError, ValueError) as e:
        raise FetchError("unreachable", f"{type(e).__name__}: {e}"[:200], again=True) from e


async def _requested(url: URL, resolved: list[Address], bounds: Bounds, seconds: float) -> bytes | str:
    """Sends a request to one of the checked addresses. Raises TimeoutError after `seconds`. Returns the body (bytes), or the
    target of a redirect (a string)."""
    if seconds <= 0:
        raise TimeoutError("no more time")
    secure = ssl.create_default_context() if url.scheme == "https" else False
    headers = {"User-Agent": bounds.agent, "Accept-Encoding": "identity", "Accept": "*/*"}
    async with (
        asyncio.timeout(seconds),
        aiohttp.TCPConnector(resolver=_Checked(resolved), use_dns_cache=False, force_close=True, ssl=secure) as connector,
        aiohttp.ClientSession(
            connector=connector, headers=headers, auto_decompress=False, max_line_size=HEADER, max_field_size=HEADER
        ) as session,
        session.get(url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=None)) as answer,
    ):
        if answer.status in (301, 302, 303, 307, 308) and (place := answer.headers.get("Location")):
            return place
        if answer.status != 200:
            raise _refused(answer)
        return await _body(answer, bounds.bytes)


def _refused(answer: aiohttp.ClientResponse) -> FetchError:
    wait = answer.headers.get("Retry-After", "")
    seconds = float(wait) if wait.isdecimal() else 0.0
    return FetchError("refused", f"HTTP {answer.status}", again=answer.status in TEMPORARY, wait=seconds)


async def _body(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    if answer.content_length is not None and answer.content_length > limit:
        raise FetchError("too_large", f"{answer.content_length:,} bytes")
    content = bytearray()
    async for block in answer.content.iter_any():
        content += block
        if len(content) > limit:
            raise FetchError("too_large", f"more than {limit:,} bytes")
    return bytes(content)


def addresses(host: str, port: int, private: bool) -> list[Address]:
    """Resolves a host's name to addresses. Raises FetchError if the host has no address.

    If `private` is false, also raises FetchError if one of the addresses isn't public.
    """
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as e:
        raise FetchError("unreachable", f"no address of {host!r} is known", again=True) from e
    for *_, place in infos:
        if not private and not public(str(place[0])):
            raise FetchError("private_address", f"{host} is at {place[0]}")
    return [*infos]


def public(address: str) -> bool:
    """Checks whether an address is on the public internet, and belongs to a single host."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if inner is None and parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return public(str(inner))
    return parsed.is_global and not parsed.is_multicast


class _Checked(AbstractResolver):
    """Resolves every host name to the checked addresses, as a resolver for aiohttp."""

    def __init__(self, resolved: list[Address]) -> None:
        self.resolved = resolved

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=str(place[0]), port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, _, _, _, place in self.resolved
        ]

    async def close(self) -> None:
        """Does nothing, because this resolver has no open connections."""
