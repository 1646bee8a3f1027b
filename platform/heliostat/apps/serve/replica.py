"""Answers what the front asks, with one version of the model, with the index, or with both."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.apps.serve.asks import IMAGES, AnswerPiece, Ask, Holds, Item, PictureRequest, Search, kind_of
from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.protocol import Paints
from heliostat.text import brief
from heliostat.web.refusals import Refusal

if TYPE_CHECKING:
    from heliostat.apps.serve.shelf import Shelf
    from heliostat.apps.serve.writer import Writer

log = logging.getLogger(__name__)

MOST_AREA = 4  # times the pixels of the model's own pictures: memory grows with them, for some models with their square


class Replica:
    """Loads what it is to hold, and answers what the front asks through `ask` and `stream`: with an item, or with `refused`."""

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
        if kind_of(folder) == IMAGES:
            self.painter = Painter(folder)
        else:
            from heliostat.apps.serve.writer import Writer

            self.writer = Writer(folder, holds.batch, holds.adapters, holds.engine)

    def check_health(self) -> None:
        """Raises if the model answers no more: Ray Serve puts another replica in the place of this one."""
        if self.writer:
            self.writer.require_alive()

    async def ask(self, what: str, asked: object) -> Item:
        """Answers as a whole: with one of the methods below, by its name."""
        try:
            return await getattr(self, what)(asked)
        except Refusal as e:
            return {"refused": e.args}

    async def stream(self, ask: Ask) -> AsyncGenerator[Item]:
        """Yields pieces (`index`, `piece`, the first also `sources`) of the answers as they come; `refused` ends them."""
        try:
            async with aclosing(self._pieces(ask)) as items:
                async for item in items:
                    yield item
        except Refusal as e:
            yield {"refused": e.args}

    async def answer(self, ask: Ask) -> Item:
        """Answers all prompts: `answers`, and `sources` if it is from the index."""
        whole: list[AnswerPiece] = [{"text": "", "logprobs": None} for _ in ask.seeds]
        sources: Item = {}
        async with aclosing(self._pieces(ask)) as items:
            async for item in items:
                _add(whole[item["index"]], item["piece"])
                sources |= {"sources": item["sources"]} if "sources" in item else {}
        return {"answers": whole, **sources}

    async def _pieces(self, ask: Ask) -> AsyncGenerator[Item]:
        assert self.writer
        first: Item = {}
        if ask.search is not None:
            assert self.shelf
            prompt, sources = await self.shelf.prompt(ask.search, self.writer.room(ask), self.writer.count)
            ask, first = dataclasses.replace(ask, prompts=[prompt], search=None), {"sources": sources}
        async with aclosing(self.writer.stream(ask)) as items:
            async for item in items:
                yield {**item, **first}
                first = {}

    async def embed(self, texts: list[str]) -> Item:
        """Embeds texts: `answers`."""
        assert self.writer
        return {"answers": await self.writer.embed(texts)}

    async def draw(self, asked: PictureRequest) -> Item:
        """Draws pictures: `images`."""
        assert self.painter
        return {"images": await self.painter.draw(asked)}

    async def search(self, asked: Search) -> Item:
        """Finds passages of the index: `passages`."""
        assert self.shelf
        return {"passages": await self.shelf.search(asked)}


class Painter:
    """Loads the model, and draws."""

    def __init__(self, folder: Path) -> None:
        recipe = exported.read(folder).recipe
        assert issubclass(recipe, Paints)
        with exported.using(folder):
            self.canvas = recipe.canvas(folder)
            self.size = self.canvas.size
        self.thread = ThreadPoolExecutor(1, "painter")  # a drawing goes on when nobody waits for it any more, and the next waits

    async def draw(self, asked: PictureRequest) -> list[dict[str, object]]:
        """Draws pictures, each a PNG in base64 with its seed; Refusal for what the model does not draw."""
        self._require_size(asked.options)
        seeds = [(asked.seed + i) % 2**63 for i in range(asked.count)]
        work = partial(self.canvas.draw, [asked.prompt] * asked.count, seeds, asked.options)
        try:
            pictures = await asyncio.get_running_loop().run_in_executor(self.thread, work)
        except ConfigError as e:
            raise Refusal(400, str(e), None, "invalid_value") from e
        except Exception as e:
            log.exception("a picture failed")
            raise Refusal(500, f"the model failed: {type(e).__name__}: {brief(e)}") from e
        return [{"b64_json": base64.b64encode(png).decode(), "seed": seed} for png, seed in zip(pictures, seeds, strict=True)]

    def _require_size(self, options: dict[str, Any]) -> None:
        width, height = self.size
        w, h = options.get("width", width), options.get("height", height)
        if w * h > MOST_AREA * width * height:
            said = f"size: {w}x{h}: the model draws {width}x{height} pixels, and at most {MOST_AREA} times as many are drawn"
            raise Refusal(400, said, "size", "invalid_value")


def _add(whole: AnswerPiece, piece: AnswerPiece) -> None:
    """Adds a piece to what came before it."""
    text, before, new = whole["text"] + piece["text"], whole["logprobs"], piece["logprobs"]
    if before and new:
        tops = None if before["top_logprobs"] is None else before["top_logprobs"] + (new["top_logprobs"] or [])
        new = {"tokens": before["tokens"] + new["tokens"], "token_logprobs": before["token_logprobs"] + new["token_logprobs"],
               "top_logprobs": tops, "text_offset": before["text_offset"] + new["text_offset"]}  # fmt: skip
    whole.update({**piece, "text": text, "logprobs": new or before})
