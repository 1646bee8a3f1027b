"""Follows the text of an answer while it grows: what of it is certain, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "\ufffd"  # what a decoder puts for the first bytes of a character


class Stopping:
    """Hands out a growing text, so that no part of a stop string and no unfinished character is ever sent."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops, self.sent, self.stopped = stops, "", False

    def feed(self, text: str, last: bool = False) -> str:
        """Takes the whole text so far, and returns what is new and certain of it; all of it if it is the last."""
        found = [place for stop in self.stops if (place := text.find(stop, self._from(stop))) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not last:
            text = text[: self._certain(text)]
        new = text[len(self.sent) :]
        self.sent += new
        return new

    def _from(self, stop: str) -> int:
        """Returns where a stop string may begin: what was sent holds none, and no beginning of one."""
        return max(0, len(self.sent) - len(stop) + 1)

    def _certain(self, text: str) -> int:
        end = len(text.rstrip(UNFINISHED))
        for stop in self.stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.endswith(stop[:size], 0, end):
                    end -= size
                    break
        return max(end, len(self.sent))
