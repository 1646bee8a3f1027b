"""Runs the functions of routes in a replica, which has loaded one version of the model, the index, or both."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from heliostat.apps.serve.asks import IMAGES, Holds, Item, PictureRequest, kind_of
from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.protocol import Paints
from heliostat.text import brief
from heliostat.web.refusals import Refusal

if TYPE_CHECKING:
    from heliostat.apps.serve.shelf import Shelf
    from heliostat.apps.serve.writer import Writer

log = logging.getLogger(__name__)

MOST_AREA = 4  # relative to the pixels of the model's default size: memory grows with the pixels, sometimes quadratically

A = TypeVar("A")


class Replica:
    """Holds the loaded model and index. `ask` and `stream` call a route's function with this replica, and return the function's
    items.

    A Refusal becomes an item `refused`, because items can travel between processes.
    """

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
        """Raises an error if the model no longer answers. Ray Serve then replaces this replica."""
        if self.writer:
            self.writer.require_alive()

    async def ask(self, answer: Callable[[Replica, A], Awaitable[Item]], request: A) -> Item:
        """Returns a complete answer. If the route raises a Refusal, returns this Refusal under the key `refused`."""
        try:
            return await answer(self, request)
        except Refusal as e:
            return {"refused": e.args}

    async def stream(self, pieces: Callable[[Replica, A], AsyncGenerator[Item]], request: A) -> AsyncGenerator[Item]:
        """Yields pieces of the answers (`index`, `piece`; the first piece may also have `sources`). An item `refused` ends the
        stream."""
        try:
            async with aclosing(pieces(self, request)) as items:
                async for item in items:
                    yield item
        except Refusal as e:
            yield {"refused": e.args}


class Painter:
    """Loads an image model and generates images, one request at a time."""

    def __init__(self, folder: Path) -> None:
        recipe = exported.read(folder).recipe
        assert issubclass(recipe, Paints)
        with exported.using(folder):
            self.canvas = recipe.canvas(folder)
            self.size = self.canvas.size
        self.thread = ThreadPoolExecutor(1, "painter")  # one request at a time, even if its client has left

    async def draw(self, request: PictureRequest) -> list[dict[str, object]]:
        """Generates images. Returns each image as PNG in base64, with its seed. Raises Refusal if the size or an option isn't
        supported, or if the model fails."""
        self._require_size(request.options)
        seeds = [(request.seed + i) % 2**63 for i in range(request.count)]
        work = partial(self.canvas.draw, [request.prompt] * request.count, seeds, request.options)
        try:
            pictures = await asyncio.get_running_loop().run_in_executor(self.thread, work)
        except ConfigError as e:
            raise Refusal(400, str(e), None, "invalid_value") from e
        except Exception as e:
            log.exception("generating an image failed")
            raise Refusal(500, f"the model failed: {type(e).__name__}: {brief(e)}") from e
        return [{"b64_json": base64.b64encode(png).decode(), "seed": seed} for png, seed in zip(pictures, seeds, strict=True)]

    def _require_size(self, options: dict[str, int]) -> None:
        width, height = self.size
        w, h = options.get("width", width), options.get("height", height)
        if w * h > MOST_AREA * width * height:
            said = (
                f"size: {w}x{h}: the model generates {width}x{height} pixels, and an image may have at most "
                f"{MOST_AREA} times as many pixels"
            )
            raise Refusal(400, said, "size", "invalid_value")
