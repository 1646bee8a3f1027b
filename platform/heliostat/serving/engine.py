"""Answers requests with one model, many at a time: a thread of its own steps all of them together, a token each.

What is in a batch beside a request changes the order of floating-point sums and nothing else: its noise is its own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from heliostat.inference.batch.engines import Embed, Input, Loaded, pads_hold
from heliostat.recipes.text.generator import ends
from heliostat.recipes.text.infilling import Infilling
from heliostat.serving import sampling
from heliostat.serving.adapters import Adapters
from heliostat.serving.group import Group
from heliostat.serving.sampling import Draw
from heliostat.serving.stopping import Stopping
from heliostat.text import brief

log = logging.getLogger(__name__)

Deliver = Callable[[dict[str, Any]], None]


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
    made: list[int] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)  # logprobs of tokens whose text is not sent yet
    over: bool = False


class Engine:
    """Answers rows in its thread, a token of each at a time, and embeds texts between two steps."""

    def __init__(self, loaded: Loaded, batch: int, adapters: Adapters | None = None) -> None:
        self.loaded, self.batch, self.adapters = loaded, batch, adapters
        self.embed = Embed(loaded, batch)
        writes = loaded.writes
        self.mixes = writes and pads_hold(self.embed)
        self.infilling = Infilling.of(loaded.tokenizer) if writes else None
        self.ends = {*ends(loaded.tokenizer, loaded.model), *(self.infilling.ends if self.infilling else [])} if writes else set()
        self.waiting: deque[Row] = deque()
        self.texts: deque[tuple[Sequence[str], Deliver]] = deque()
        self.groups: list[tuple[Group, list[Row]]] = []
        self.work = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def begin(self, rows: Sequence[Row]) -> None:
        """Takes rows; they are answered in turn."""
        with self.work:
            self.waiting.extend(rows)
            self.work.notify()

    def embedded(self, texts: Sequence[str], deliver: Deliver) -> None:
        """Takes texts to embed."""
        with self.work:
            self.texts.append((texts, deliver))
            self.work.notify()

    def _run(self) -> None:
        while True:
            with self.work:
                self.work.wait_for(lambda: self.waiting or self.texts or self.groups)
                texts = list(self.texts)
                self.texts.clear()
                new = self._admitted()
            with torch.inference_mode():
                if texts:
                    self._embed(texts)
                if new:
                    self._begin(new)
                for one in list(self.groups):
                    self._step(one)

    def _admitted(self) -> list[Row]:
        """Takes waiting rows for which there is room; where padding would change answers, of one length only."""
        room, taken, left = self.batch - sum(len(rows) for _, rows in self.groups), list[Row](), deque[Row]()
        while self.waiting and room > len(taken):
            row = self.waiting.popleft()
            if row.over:
                continue
            fits = self.mixes or not taken or len(row.prompt) == len(taken[0].prompt)
            (taken if fits else left).append(row)
        self.waiting.extendleft(reversed(left))
        return taken

    def _begin(self, rows: list[Row]) -> None:
        try:
            prompts, names = [row.prompt for row in rows], [row.adapter for row in rows]
            group = Group(self.loaded.model, prompts, self.loaded.pad, names, self.adapters)
            into = next((one for one in self.groups if self.mixes and group.plain and one[0].plain), None)
            if into is None:
                self.groups.append((group, rows))
            else:
                into[0].join(group)
                into[1].extend(rows)
        except Exception as e:  # noqa: BLE001 (whatever a model raises: the others go on)
            if len(rows) == 1:
                self._fail(rows, e)
                return
            for row in rows:
                self._begin([row])

    def _step(self, one: tuple[Group, list[Row]]) -> None:
        """Draws a token for each row of a group, and goes on with those that are not at their end."""
        group, rows = one
        try:
            tokens = sampling.choose(group.logits, [row.draw for row in rows])
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if not row.over:
                    self._take(row, token, group.logits[place])
            open_ = [place for place, row in enumerate(rows) if not row.over]
            if not open_:
                self.groups.remove(one)
                return
            if group.plain and len(open_) < len(rows):
                group.keep(open_)
                rows[:], tokens = [rows[place] for place in open_], [tokens[place] for place in open_]
            group.step(tokens)
        except Exception as e:  # noqa: BLE001 (the same)
            self.groups.remove(one)
            self._fail([row for row in rows if not row.over], e)

    def _take(self, row: Row, token: int, logits: torch.Tensor) -> None:
        """Adds a token to a row, and delivers what of its text is certain."""
        ended = token in self.ends
        before = len(self._text(row)) if row.logprobs is not None else 0
        if not ended:
            row.made.append(token)
            if row.logprobs is not None:
                row.told.append({"offset": before, **self._told(sampling.logprobs(logits, token, row.logprobs), token)})
        full = len(row.made) >= row.most
        text = row.stopping.feed(self._text(row), last=ended or full)
        row.over = ended or full or row.stopping.stopped
        if not text and not row.over:
            return
        piece: dict[str, Any] = {"text": text, "logprobs": self._logprobs(row)}
        if row.over:
            finish = "stop" if ended or row.stopping.stopped else "length"
            piece |= {"finish": finish, "prompt_tokens": len(row.prompt), "completion_tokens": len(row.made)}
        row.deliver(piece)

    def _text(self, row: Row) -> str:
        return self.loaded.tokenizer.decode(row.made, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _told(self, found: dict[str, Any], token: int) -> dict[str, Any]:
        show = self.loaded.tokenizer.decode
        best = {show([other]): value for other, value in reversed(found["best"])}  # of tokens with one text, the likeliest
        return {"token": show([token]), "logprob": found["chosen"], "best": best}

    def _logprobs(self, row: Row) -> dict[str, Any] | None:
        """Returns those of the tokens that begin within the text that is sent, in OpenAI's columns."""
        if row.logprobs is None:
            return None
        sent = [one for one in row.told if one["offset"] < len(row.stopping.sent)]
        row.told = row.told[len(sent) :]
        return {
            "tokens": [one["token"] for one in sent],
            "token_logprobs": [one["logprob"] for one in sent],
            "top_logprobs": [one["best"] for one in sent] if row.logprobs else None,
            "text_offset": [one["offset"] for one in sent],
        }

    def _embed(self, asked: list[tuple[Sequence[str], Deliver]]) -> None:
        """Embeds the texts of several requests together."""
        try:
            made = iter(self.embed([Input(text, 0) for texts, _ in asked for text in texts]))
            for texts, deliver in asked:
                deliver({"answers": [next(made) for _ in texts]})
        except Exception as e:  # noqa: BLE001 (the same)
            for _, deliver in asked:
                deliver({"failed": f"{type(e).__name__}: {brief(e)}"})

    def _fail(self, rows: list[Row], error: Exception) -> None:
        log.error("%d requests failed (%s: %s)", len(rows), type(error).__name__, brief(error))
        for row in rows:
            row.over = True
            row.deliver({"failed": f"{type(error).__name__}: {brief(error)}"})
