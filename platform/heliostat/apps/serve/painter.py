"""Draws pictures with a model, one request at a time."""

from __future__ import annotations

import asyncio
import base64
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from heliostat.apps.serve.asks import PictureRequest
from heliostat.config.fields import Json
from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.protocol import Paints
from heliostat.text import brief
from heliostat.web.refusals import Refusal

log = logging.getLogger(__name__)

MOST_AREA = 4  # times the pixels of the model's own pictures: memory grows with them, for some models with their square


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

    def _require_size(self, options: dict[str, Json]) -> None:
        width, height = self.size
        w, h = options.get("width", width), options.get("height", height)
        if w * h > MOST_AREA * width * height:
            said = f"size: {w}x{h}: the model draws {width}x{height} pixels, and at most {MOST_AREA} times as many are drawn"
            raise Refusal(400, said, "size", "invalid_value")
