"""Converts the tokens of each request into the pieces of text that are sent to the client. Both engines use this module."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from heliostat.apps.serve.asks import UNFINISHED, Item, Logprobs
from heliostat.errors import ConfigError
from heliostat.inference.batch.engines import LoadedModel
from heliostat.inference.sampling import Chosen, Draw
from heliostat.recipes.text.generator import ends
from heliostat.recipes.text.infilling import Infilling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 128  # tokens: if this many tokens give no text, their bytes aren't the beginning of a character

Deliver = Callable[[Item], None]


class Stopping:
    """Decides how much of a growing text can be sent. It never sends part of a stop string or an incomplete character.

    `sent`: number of characters that were sent.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops, self.sent, self.stopped = stops, 0, False

    def feed(self, rest: str, last: bool = False) -> str:
        """Takes the unsent text. Returns the part at its beginning that can be sent now.

        Keeps back text that could be the beginning of a stop string, unless `last` is true. No stop string begins in the sent
        text.
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


def _stream() -> DecodeStream:
    return DecodeStream(skip_special_tokens=True)


@dataclass
class Growing:
    """Holds the part of an answer's text that isn't sent yet (`unsent`), without a character that later tokens may complete."""

    unsent: str = ""
    waiting: list[int] = field(default_factory=list)  # the last tokens, whose text isn't complete yet
    stream: DecodeStream = field(default_factory=_stream)

    def add(self, token: int, tokenizer: Tokenizer) -> None:
        """Appends the answer's next token. This token must not be a special token."""
        self.waiting.append(token)
        try:
            text = self.stream.step(tokenizer, token)
            broken = text is None and not len(self.waiting) % LONG and self._rest(tokenizer).endswith(UNFINISHED)
        except Exception:  # noqa: BLE001 - the library has no narrower error for a byte that changes earlier text
            broken = True
        if broken:
            text, self.stream = self._rest(tokenizer), _stream()
        if text is not None:
            self.unsent += text
            self.waiting.clear()

    def drop(self, sent: int) -> None:
        """Removes the first `sent` characters, because these were sent."""
        self.unsent = self.unsent[sent:]

    def _rest(self, tokenizer: Tokenizer) -> str:
        return tokenizer.decode(self.waiting, skip_special_tokens=True)


class Drawn(TypedDict):
    """Describes a token whose text isn't sent yet. `offset`: the position in the answer at which the token's text begins, in
    characters. `best`: log probabilities of the likeliest tokens."""

    offset: int
    token: str
    logprob: float
    best: dict[str, float]


@dataclass(eq=False)
class Row:
    """Holds the state of a prompt and its answer. `deliver` takes the answer's pieces; the last piece has `finish` or
    `failed`."""

    prompt: list[int]
    most: int
    draw: Draw
    stopping: Stopping
    deliver: Deliver
    logprobs: int | None = None
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    text: Growing = field(default_factory=Growing)
    logprobs_unsent: list[Drawn] = field(default_factory=list)  # logprobs of tokens whose text isn't sent yet
    over: bool = False
    task: asyncio.Task[None] | None = None  # the task that generates this row's answer, if the engine runs in the event loop

    def leave(self) -> None:
        """Ends the row because the row's client has left. Call this method in the event loop."""
        self.over = True
        if self.task is not None:
            self.task.cancel()

    def fail(self, said: str) -> None:
        """Ends the row with the error message `said` instead of an answer."""
        self.over = True
        self.deliver({"failed": said})


def ending(loaded: LoadedModel, infilling: Infilling | None) -> set[int]:
    """Returns the ids of the tokens that end an answer, including those that end a fill-in-the-middle answer.

    Raises ConfigError if the tokenizer can't decode text token by token.
    """
    if getattr(loaded.tokenizer, "backend_tokenizer", None) is None:
        kind = type(loaded.tokenizer).__name__
        raise ConfigError(
            f"the model's tokenizer isn't from the tokenizers library ({kind}). Convert the tokenizer to a tokenizer.json"
        )
    return {*ends(loaded.tokenizer, loaded.generation()), *(infilling.ends if infilling else [])}


class Telling:
    """Appends tokens to rows, and delivers the text that can be sent. `ends`: ids of the tokens that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.without_text = frozenset(tokenizer.all_special_ids)

    def take(self, row: Row, token: int, chosen: Chosen | None) -> None:
        """Appends a token to a row. `chosen`: the token's log probabilities, if the row's request asks for log probabilities."""
        ended, begins = token in self.ends, row.stopping.sent + len(row.text.unsent)  # begins: where the character begins
        if not ended:
            row.tokens.append(token)
            if token not in self.without_text:
                row.text.add(token, self.tokenizer.backend_tokenizer)
        full = len(row.tokens) >= row.most
        rest = self._decode(row.tokens)[row.stopping.sent :] if ended or full else row.text.unsent
        if chosen is not None and not ended:
            row.logprobs_unsent.append(self._drawn(chosen, token, begins))
        text = row.stopping.feed(rest, last=ended or full)
        row.text.drop(len(text))
        row.over = ended or full or row.stopping.stopped
        if not text and not row.over:
            return
        piece: Item = {"text": text, "logprobs": self._logprobs(row)}
        if row.over:
            finish = "stop" if ended or row.stopping.stopped else "length"
            piece |= {"finish": finish, "prompt_tokens": len(row.prompt), "completion_tokens": len(row.tokens)}
        row.deliver(piece)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _drawn(self, chosen: Chosen, token: int, begins: int) -> Drawn:
        decode = self.tokenizer.decode
        best = {str(decode([other])): value for other, value in reversed(chosen["best"])}  # the likeliest of equal texts
        return {"offset": begins, "token": str(decode([token])), "logprob": chosen["chosen"], "best": best}

    def _logprobs(self, row: Row) -> Logprobs | None:
        """Returns the log probabilities of the tokens whose text begins in the sent part, in OpenAI's format.

        If the answer has ended without a stop string, adds the log probabilities of all other tokens, such as tokens without
        text.
        """
        if row.logprobs is None:
            return None
        rest = row.over and not row.stopping.stopped
        sent = [one for one in row.logprobs_unsent if rest or one["offset"] < row.stopping.sent]
        row.logprobs_unsent = row.logprobs_unsent[len(sent) :]
        return {
            "tokens": [one["token"] for one in sent],
            "token_logprobs": [one["logprob"] for one in sent],
            "top_logprobs": [one["best"] for one in sent] if row.logprobs else None,
            "text_offset": [one["offset"] for one in sent],
        }
