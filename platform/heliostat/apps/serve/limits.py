"""Limits what each key may ask for: requests at a time, and requests a minute."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable

from heliostat.web.refusals import Refusal

MINUTE = 60.0


class Limits:
    """Counts the requests of each key, those of the last minute and those that are open; 0 is no limit."""

    def __init__(self, at_once: int, a_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.at_once, self.a_minute, self.clock = at_once, a_minute, clock
        self.open: defaultdict[str, int] = defaultdict(int)
        self.began: defaultdict[str, deque[float]] = defaultdict(deque)

    def enter(self, name: str) -> None:
        """Begins a request; Refusal with 429 beyond a limit."""
        now, began = self.clock(), self.began[name]
        while began and began[0] <= now - MINUTE:
            began.popleft()
        if self.at_once and self.open[name] >= self.at_once:
            raise self._refusal(f"{self.at_once} requests of this key are open", 1)
        if self.a_minute and len(began) >= self.a_minute:
            raise self._refusal(f"{self.a_minute} requests of this key came within a minute", began[0] + MINUTE - now)
        self.open[name] += 1
        if self.a_minute:
            began.append(now)

    def leave(self, name: str) -> None:
        """Ends a request."""
        self.open[name] -= 1

    def _refusal(self, why: str, seconds: float) -> Refusal:
        after = max(1, math.ceil(seconds))
        return Refusal(429, f"{why}, which is the limit; try again in {after} s", None, "rate_limit_exceeded", after)
