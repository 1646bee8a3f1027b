"""Decodes an answer while it grows, at a cost per token that does not grow with it: by the stream of the tokenizers library."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from heliostat.apps.serve.stopping import UNFINISHED

LONG = 128  # tokens without text, from which on what stays unfinished is no character


def _stream() -> DecodeStream:
    return DecodeStream(skip_special_tokens=True)


@dataclass
class Growing:
    """Holds what of an answer's text is not sent yet (`unsent`), without a character that more tokens may finish."""

    unsent: str = ""
    waiting: list[int] = field(default_factory=list)  # the last tokens, which have no text yet
    stream: DecodeStream = field(default_factory=_stream)

    def add(self, token: int, tokenizer: Tokenizer) -> None:
        """Takes the answer's next token, one that has text."""
        self.waiting.append(token)
        try:
            text = self.stream.step(tokenizer, token)
            broken = text is None and not len(self.waiting) % LONG and self._rest(tokenizer).endswith(UNFINISHED)
        except Exception:  # noqa: BLE001 - the library has no narrower one for a byte that changes the text before it
            broken = True
        if broken:
            text, self.stream = self._rest(tokenizer), _stream()
        if text is not None:
            self.unsent += text
            self.waiting.clear()

    def drop(self, sent: int) -> None:
        """Forgets characters that were sent."""
        self.unsent = self.unsent[sent:]

    def _rest(self, tokenizer: Tokenizer) -> str:
        return tokenizer.decode(self.waiting, skip_special_tokens=True)
