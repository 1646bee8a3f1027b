"""Answers what the front asks, with one version of the model, with the index, or with both."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.apps.serve import kinds
from heliostat.apps.serve.asks import AnswerPiece, Ask, Holds, Item, PictureRequest, Search
from heliostat.web.refusals import Refusal

if TYPE_CHECKING:  # a replica loads what it holds, and no more libraries than that
    from heliostat.apps.serve.painter import Painter
    from heliostat.apps.serve.shelf import Shelf
    from heliostat.apps.serve.writer import Writer


class Replica:
    """Loads what it is to hold, and answers: `answers`, `images`, `passages`, or `refused`."""

    def __init__(self, holds: Holds) -> None:
        self.writer: Writer | None = None
        self.painter: Painter | None = None
        self.shelf: Shelf | None = None
        if holds.model is not None:
            self._load(Path(holds.model), holds)
        if holds.index is not None:
            from heliostat.apps.serve.shelf import Shelf

            self.shelf = Shelf(holds.index, holds.embedder, holds.reranker)

    def _load(self, folder: Path, holds: Holds) -> None:
        if kinds.of(folder) == kinds.IMAGES:
            from heliostat.apps.serve.painter import Painter

            self.painter = Painter(folder)
        else:
            from heliostat.apps.serve.writer import Writer

            self.writer = Writer(folder, holds.batch, holds.adapters, holds.engine)

    def check_health(self) -> None:
        """Raises if the model answers no more: Ray Serve puts another replica in the place of this one."""
        if self.writer:
            self.writer.require_alive()

    async def answer(self, ask: Ask) -> Item:
        """Answers all prompts as a whole: `answers`, and `sources` if it is from the index."""
        whole: list[AnswerPiece] = [{"text": "", "logprobs": None} for _ in ask.seeds]
        sources: Item = {}
        async with aclosing(self.stream(ask)) as items:
            async for item in items:
                if "piece" not in item:
                    return item
                _add(whole[item["index"]], item["piece"])
                sources |= {"sources": item["sources"]} if "sources" in item else {}
        return {"answers": whole, **sources}

    async def stream(self, ask: Ask) -> AsyncGenerator[Item]:
        """Yields pieces (`index`, `piece`, the first also `sources`) of the answers as they come; or one item, `refused`."""
        assert self.writer
        first: Item = {}
        if ask.search is not None:
            try:
                prompt, sources = await self._from_index(ask, ask.search)
            except Refusal as e:
                yield {"refused": e.args}
                return
            ask, first = dataclasses.replace(ask, prompts=[prompt], search=None), {"sources": sources}
        async with aclosing(self.writer.stream(ask)) as items:
            async for item in items:
                yield {**item, **first} if "piece" in item else item
                first = {}

    async def _from_index(self, ask: Ask, search: Search) -> tuple[str, list[Item]]:
        assert self.shelf and self.writer
        return await self.shelf.prompt(search, self.writer.room(ask), self.writer.count)

    async def embed(self, texts: list[str]) -> Item:
        """Embeds texts: `answers`."""
        assert self.writer
        return await self.writer.embed(texts)

    async def draw(self, asked: PictureRequest) -> Item:
        """Draws pictures: `images`."""
        assert self.painter
        try:
            return {"images": await self.painter.draw(asked)}
        except Refusal as e:
            return {"refused": e.args}

    async def search(self, asked: Search) -> Item:
        """Finds passages of the index: `passages`."""
        assert self.shelf
        try:
            return {"passages": await self.shelf.search(asked)}
        except Refusal as e:
            return {"refused": e.args}


def _add(whole: AnswerPiece, piece: AnswerPiece) -> None:
    """Adds a piece to what came before it."""
    text, before, new = whole["text"] + piece["text"], whole["logprobs"], piece["logprobs"]
    if before and new:
        tops = None if before["top_logprobs"] is None else before["top_logprobs"] + (new["top_logprobs"] or [])
        new = {"tokens": before["tokens"] + new["tokens"], "token_logprobs": before["token_logprobs"] + new["token_logprobs"],
               "top_logprobs": tops, "text_offset": before["text_offset"] + new["text_offset"]}  # fmt: skip
    whole.update({**piece, "text": text, "logprobs": new or before})
