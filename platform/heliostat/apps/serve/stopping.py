"""Follows the text of an answer while it grows: what of it is certain, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "\ufffd"  # what a decoder puts for the first bytes of a character


class Stopping:
    """Hands out a growing text, so that no part of a stop string and no unfinished character is ever sent. `sent`: characters."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops, self.sent, self.stopped = stops, 0, False

    def feed(self, rest: str, last: bool = False) -> str:
        """Takes the text that follows what was sent, and returns what of it is certain; all of it if it is the last.

        No stop string begins before it: what might be the beginning of one is not sent.
        """
        ends = [place for stop in self.stops if (place := rest.find(stop)) >= 0]
        if ends:
            self.stopped, rest = True, rest[: min(ends)]
        elif not last:
            rest = rest[: self._certain(rest)]
        self.sent += len(rest)
        return rest

    def _certain(self, rest: str) -> int:
        end = len(rest.rstrip(UNFINISHED))
        for stop in self.stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if rest.endswith(stop[:size], 0, end):
                    end -= size
                    break
        return end
