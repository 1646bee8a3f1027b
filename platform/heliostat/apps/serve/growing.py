"""Decodes an answer while it grows, at a cost per token that does not grow with it.

Only the last tokens are decoded again: those of a window, behind a prefix whose text is settled. The prefix is there because a
token's text depends on what comes before it, such as the space that a first word has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from heliostat.apps.serve.stopping import UNFINISHED

WINDOW = 16  # tokens that are settled together
OPEN = 4  # last tokens, which may be pieces of one character
LONG = 128  # tokens of a window, from which on what stays unfinished is settled too: bytes that are no text

Decode = Callable[[list[int]], str]


@dataclass
class Growing:
    """Holds what of an answer's text is not sent yet: `settled`, and `fresh`, which more tokens may change."""

    settled: str = ""
    fresh: str = ""
    skip: int = 0  # characters of the two that were sent
    tokens: list[int] = field(default_factory=list)  # the window: those of the prefix, and then those that are not settled
    middle: int = 0  # how many are the prefix's
    prefix: str = ""

    @property
    def unsent(self) -> str:
        return (self.settled + self.fresh)[self.skip :]

    def add(self, token: int, decode: Decode) -> None:
        """Takes the answer's next token, one that has text."""
        self.tokens.append(token)
        text = decode(self.tokens)
        self.fresh = text[len(self.prefix) :]
        if len(self.tokens) - self.middle >= WINDOW + OPEN:
            self._settle(text, decode)

    def drop(self, sent: int) -> None:
        """Forgets characters that were sent."""
        self.skip += sent
        gone = min(self.skip, len(self.settled))
        self.settled, self.skip = self.settled[gone:], self.skip - gone

    def _settle(self, text: str, decode: Decode) -> None:
        """Moves the window on, if its tokens can be parted between two characters."""
        size = len(self.tokens)
        for middle in range(size - OPEN, size - 2 * OPEN, -1):
            known = decode(self.tokens[:middle])
            if known.endswith(UNFINISHED) and size < LONG:
                continue
            prefix = decode(self.tokens[self.middle : middle])
            if prefix and text.startswith(known) and known.startswith(self.prefix):
                self.settled += known[len(self.prefix) :]
                self.fresh = text[len(known) :]
                self.tokens, self.middle, self.prefix = self.tokens[self.middle :], middle - self.middle, prefix
                self.drop(0)
                return
