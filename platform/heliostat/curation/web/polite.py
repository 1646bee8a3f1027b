"""Fetches URLs by the rules of the URLs' hosts: only URLs that robots.txt allows, at a limited rate, and with the `Crawl-delay`
of robots.txt.

Each task has its own fetcher. Tasks with URLs of the same host share the host's rate, so nodes need no coordination. A fetcher
reads robots.txt once per origin (RFC 9309: if robots.txt is missing, all URLs are allowed; if robots.txt is unreachable, no URLs
are allowed). The same rules apply to the targets of redirects.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from heliostat.curation.web import robots
from heliostat.curation.web.client import Bounds, FetchError, get, split

ROBOTS_BYTES = 512 << 10  # RFC 9309 requires 500 KiB
LONGEST_S = 60.0  # maximum seconds between two requests; a host that wants more isn't fetched from


@dataclass
class Host:
    """Holds the time of the next allowed request to a host, on any port, and the pause between requests in seconds. `of`: the
    number of fetchers that share the host's rate."""

    pause: float
    of: int
    next: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class OriginRules:
    rules: robots.RobotsRules | None = None
    closed: FetchError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Fetcher:
    """Fetches URLs from any number of threads, with at least `pause` seconds between two requests to one host.

    `of`: the number of fetchers that share a host's rate. So each fetcher waits `of` times as long between two requests. The same
    is true of a `Crawl-delay` in the host's robots.txt. `alone`: the hosts from which only this fetcher fetches URLs.
    """

    def __init__(self, bounds: Bounds, pause: float, retries: int, robots: bool, sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic, of: int = 1) -> None:  # fmt: skip
        self.bounds, self.pause, self.retries, self.robots, self.of = bounds, pause, retries, robots, of
        self.sleep, self.clock = sleep, clock
        self.alone: set[str] = set()
        self.hosts: dict[str, Host] = {}
        self.origins: dict[str, OriginRules] = {}
        self.lock = threading.Lock()

    def __call__(self, url: str) -> bytes:
        """Returns the body of a URL. Raises FetchError if the request fails, also after all retries."""
        hosts = list[Host]()
        for attempt in range(self.retries + 1):
            try:
                return get(url, self.bounds, lambda hop: hosts.append(self._admitted(hop)))
            except FetchError as e:
                if not e.again or attempt == self.retries or e.wait > LONGEST_S:
                    raise
                with hosts[-1].lock:
                    hosts[-1].next = max(hosts[-1].next, self.clock() + max(e.wait, self.pause * hosts[-1].of * 2**attempt))
        raise AssertionError("a loop that returns or raises")

    def _admitted(self, url: str) -> Host:
        """Waits until a request for a URL is allowed, and returns the URL's host. Raises FetchError if robots.txt doesn't allow
        the URL."""
        scheme, name, port, target = split(url)
        if self.robots:
            base = f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}"
            with self.lock:
                origin = self.origins.setdefault(base, OriginRules())
            self._learn(origin, base)
            if origin.closed:
                raise origin.closed
            if origin.rules and not origin.rules.allow(target):
                raise FetchError("robots", f"robots.txt of {name} does not allow it")
        return self._wait(url)

    def _wait(self, url: str) -> Host:
        """Waits until the rate of a URL's host allows the next request, and returns the host."""
        host = self._host(split(url)[1])
        with host.lock:
            now = self.clock()
            turn = max(now, host.next)
            host.next = turn + host.pause
        if turn > now:
            self.sleep(turn - now)
        return host

    def _host(self, name: str) -> Host:
        with self.lock:
            of = 1 if name in self.alone else self.of
            return self.hosts.setdefault(name, Host(self.pause * of, of))

    def _learn(self, origin: OriginRules, base: str) -> None:
        """Reads the origin's robots.txt once, and stores the rules in `origin`. `base`: the origin's URL. For a redirect of
        robots.txt, waits until the target's host allows a request, but doesn't read the target's robots.txt."""
        with origin.lock:
            if origin.rules or origin.closed:
                return
            name, rules = split(base)[1], robots.RobotsRules()
            bounds = Bounds(ROBOTS_BYTES, self.bounds.seconds, self.bounds.private, self.bounds.agent)
            try:
                rules = robots.parse(get(f"{base}/robots.txt", bounds, self._wait), self.bounds.agent)
            except FetchError as e:
                if e.reason == "private_address":
                    origin.closed = e
                elif e.reason != "refused" or e.again:
                    origin.closed = FetchError("robots", f"robots.txt of {name} cannot be had ({e.reason}: {e.detail})")
            if rules.delay > LONGEST_S:
                origin.closed = FetchError("robots", f"robots.txt of {name} asks for {rules.delay:g} s between requests")
            else:
                host = self._host(name)
                with host.lock:
                    host.pause = max(host.pause, rules.delay * host.of)
                    host.next = max(host.next, self.clock() + host.pause)
            origin.rules = rules


def host_of(url: str) -> str:
    try:
        return (urlsplit(url.strip()).hostname or "").lower()
    except ValueError:
        return ""
