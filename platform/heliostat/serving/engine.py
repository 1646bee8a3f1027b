"""Answers requests with one model, many at a time: a thread of its own steps all of them together, a token each.

What is in a batch beside a request changes the order of floating-point sums and nothing else: its noise is its own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

import torch

from heliostat.inference.batch.engines import Embed, Input, Loaded, pads_hold
from heliostat.recipes.text.infilling import Infilling
from heliostat.serving import sampling
from heliostat.serving.adapters import Adapters
from heliostat.serving.group import Group
from heliostat.serving.row import Deliver, Row, Telling, ending
from heliostat.text import brief

log = logging.getLogger(__name__)


class Engine:
    """Answers rows in its thread, a token of each at a time, and embeds texts between two steps."""

    embeds = True

    def __init__(self, loaded: Loaded, batch: int, adapters: Adapters | None = None) -> None:
        self.loaded, self.batch, self.adapters = loaded, batch, adapters
        self.embed = Embed(loaded, batch)
        writes = loaded.writes
        self.mixes = writes and pads_hold(self.embed)
        self.infilling = Infilling.of(loaded.tokenizer) if writes else None
        self.telling = Telling(loaded.tokenizer, ending(loaded, self.infilling) if writes else ())
        self.waiting: deque[Row] = deque()
        self.texts: deque[tuple[Sequence[str], Deliver]] = deque()
        self.groups: list[tuple[Group, list[Row]]] = []
        self.work = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    def require_alive(self) -> None:
        """Raises RuntimeError if the thread has ended."""
        if not self.thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

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
                    told = None if row.logprobs is None else sampling.logprobs(group.logits[place], token, row.logprobs)
                    self.telling.take(row, token, told)
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
            row.fail(f"{type(error).__name__}: {brief(error)}")
