"""Follows a prompt's way to its answer: from tokens to the pieces of text that are sent, with either engine."""

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

LONG = 128  # tokens without text, from which on what stays unfinished is no character

Deliver = Callable[[Item], None]


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


class Drawn(TypedDict):
    """Describes a token whose text is not sent yet: where that begins, and log probabilities."""

    offset: int
    token: str
    logprob: float
    best: dict[str, float]


@dataclass(eq=False)
class Row:
    """Holds a prompt's way to its answer. `deliver` takes its pieces; the one with `finish` or `failed` is the last."""

    prompt: list[int]
    most: int
    draw: Draw
    stopping: Stopping
    deliver: Deliver
    logprobs: int | None = None
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    text: Growing = field(default_factory=Growing)
    logprobs_unsent: list[Drawn] = field(default_factory=list)  # logprobs of tokens whose text is not sent yet
    over: bool = False
    task: asyncio.Task[None] | None = None  # that follows it, of an engine in the event loop

    def leave(self) -> None:
        """Ends the row when its client has left. Call it in the event loop."""
        self.over = True
        if self.task is not None:
            self.task.cancel()

    def fail(self, said: str) -> None:
        """Ends without an answer."""
        self.over = True
        self.deliver({"failed": said})


def ending(loaded: LoadedModel, infilling: Infilling | None) -> set[int]:
    """Returns the tokens that end an answer, a middle among them; ConfigError if its text cannot be decoded as it grows."""
    if getattr(loaded.tokenizer, "backend_tokenizer", None) is None:
        kind = type(loaded.tokenizer).__name__
        raise ConfigError(f"the model's tokenizer isn't one of the tokenizers library ({kind}). Convert it to a tokenizer.json")
    return {*ends(loaded.tokenizer, loaded.generation()), *(infilling.ends if infilling else [])}


class Telling:
    """Adds tokens to rows, and delivers what of their texts is certain. `ends`: the tokens that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.without_text = frozenset(tokenizer.all_special_ids)

    def take(self, row: Row, token: int, chosen: Chosen | None) -> None:
        """Adds a token; `chosen` of a row that wants logprobs."""
        ended, begins = token in self.ends, row.stopping.sent + len(row.text.unsent)  # of a character's piece: where it begins
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
        best = {str(decode([other])): value for other, value in reversed(chosen["best"])}  # of one text, the likeliest
        return {"offset": begins, "token": str(decode([token])), "logprob": chosen["chosen"], "best": best}

    def _logprobs(self, row: Row) -> Logprobs | None:
        """Returns those of the tokens that begin within the text that is sent, in OpenAI's columns; at an end without a stop
        string all that are left, as one without text."""
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
