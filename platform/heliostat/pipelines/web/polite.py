"""Fetches URLs as their hosts ask for: what robots.txt allows, so many a second, later where a host says so.

A fetcher belongs to one task, and a host's URLs to tasks that share its pace, so that nothing needs to be agreed on between
nodes. robots.txt is read once for each host and task (RFC 9309: one that is missing allows all, one that cannot be had nothing).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser

from heliostat.pipelines.web.client import Bounds, FetchError, get, split

ROBOTS_BYTES = 512 << 10  # RFC 9309 asks for 500 KiB
DELAY = re.compile(r"(?im)^(\s*crawl-delay\s*:\s*)(\d*\.\d+)")
LONGEST_S = 60.0  # that a host may ask for between two requests; what it wants more than that is not fetched from it


@dataclass
class Host:
    """Keeps a host's rules, and when it may be asked next."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    rules: RobotFileParser | None = None
    closed: FetchError | None = None
    pause: float = 0.0
    next: float = 0.0


class Fetcher:
    """Fetches URLs from any number of threads; `pause` seconds, at least, lie between two requests to one host."""

    def __init__(self, bounds: Bounds, pause: float, retries: int, robots: bool, sleep: Callable[[float], None] = time.sleep,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.bounds, self.pause, self.retries, self.robots = bounds, pause, retries, robots
        self.sleep, self.clock = sleep, clock
        self.hosts: dict[str, Host] = {}
        self.lock = threading.Lock()

    def __call__(self, url: str) -> bytes:
        """Returns what a URL has; FetchError, after so many retries, if it has nothing."""
        scheme, name, port, _ = split(url)
        base = f"{scheme}://{name}:{port}"
        with self.lock:
            host = self.hosts.setdefault(base, Host(pause=self.pause))
        if self.robots:
            self._learn(host, base)
            if host.closed:
                raise host.closed
            if host.rules and not host.rules.can_fetch(self.bounds.agent, url):
                raise FetchError("robots", "robots.txt does not allow it")
        for attempt in range(self.retries + 1):
            self._wait(host)
            try:
                return get(url, self.bounds)
            except FetchError as e:
                if not e.again or attempt == self.retries or e.wait > LONGEST_S:
                    raise
                with host.lock:
                    host.next = max(host.next, self.clock() + max(e.wait, self.pause * 2**attempt))
        raise AssertionError("a loop that returns or raises")

    def _wait(self, host: Host) -> None:
        """Waits for the host's turn."""
        with host.lock:
            now = self.clock()
            turn = max(now, host.next)
            host.next = turn + host.pause
        if turn > now:
            self.sleep(turn - now)

    def _learn(self, host: Host, base: str) -> None:
        """Reads the host's robots.txt, once."""
        with host.lock:
            if host.rules or host.closed:
                return
            rules = RobotFileParser()
            try:
                text = get(
                    f"{base}/robots.txt", Bounds(ROBOTS_BYTES, self.bounds.seconds, self.bounds.private, self.bounds.agent)
                )
                rules.parse(_whole(text.decode("utf-8", "replace")).splitlines())
            except FetchError as e:
                if e.reason == "private_address":
                    host.closed = e
                elif e.reason == "refused" and not e.again:
                    rules.parse([])
                else:
                    host.closed = FetchError("robots", f"robots.txt cannot be had ({e.reason}: {e.detail})")
            delay = float(rules.crawl_delay(self.bounds.agent) or 0.0)
            if delay > LONGEST_S:
                host.closed = FetchError("robots", f"robots.txt asks for {delay:g} s between requests")
            host.rules, host.pause = rules, max(host.pause, delay)
            host.next = self.clock() + host.pause


def _whole(text: str) -> str:
    """Rounds the seconds of crawl delays up: the standard library's parser passes over those with a fraction."""
    return DELAY.sub(lambda found: f"{found[1]}{ceil(float(found[2]))}", text)


def host_of(url: str) -> str:
    """Returns the host that a URL names, "" if it names none."""
    try:
        return (urlsplit(url.strip()).hostname or "").lower()
    except ValueError:
        return ""
