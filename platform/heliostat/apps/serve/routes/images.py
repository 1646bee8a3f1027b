"""Answers `/v1/images/generations`: generates images."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from heliostat.apps.serve.asks import IMAGES, Item, PictureRequest
from heliostat.apps.serve.gateway import FrontSettings, Measures
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.requests import Body, Whole
from heliostat.apps.serve.route import Answer, Route, seed
from heliostat.recipes.images.interval import Interval
from heliostat.schema import Float

MOST_IMAGES = 10  # maximum images per request, as in OpenAI's API
MOST_STEPS = 1000
OPTIONS = ("steps", "guidance", "guidance_interval", "guidance_rescale", "sampler")


class Images(Body):
    """Holds a request for images. Missing parameters get the model's defaults.

    heliostat adds `steps`, `guidance`, `guidance_interval`, `guidance_rescale`, `sampler`, and `seed` to OpenAI's parameters.
    """

    neutral = {
        "quality": "auto", "style": "natural", "background": "auto", "moderation": "auto", "output_format": "png",
        "stream": False, "output_compression": 100, "partial_images": 0,
    }  # fmt: skip
    model: str
    prompt: Whole
    n: int = Field(1, ge=1, le=MOST_IMAGES)
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")
    response_format: Literal["b64_json"] = "b64_json"
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    guidance: Float | None = Field(None, ge=0)
    guidance_interval: Interval | None = None
    guidance_rescale: Float | None = Field(None, ge=0, le=1)
    sampler: Literal["ddpm", "ddim", "dpm++", "euler"] | None = None

    @property
    def options(self) -> dict[str, object]:
        """Returns the options that the request sets, such as `steps`, `width`, and `height`."""
        chosen = {name: getattr(self, name) for name in OPTIONS}
        if self.size != "auto":
            chosen["width"], chosen["height"] = map(int, self.size.split("x"))
        return {name: value for name, value in chosen.items() if value is not None}


class ImagesRoute(Route[Images, PictureRequest]):
    """Answers requests for images; each image has its seed."""

    path, body = "/v1/images/generations", Images

    def request(self, settings: FrontSettings, body: Images) -> PictureRequest:
        settings.require_model(body.model, IMAGES)
        return PictureRequest(body.prompt, body.n, seed(body.seed), body.options)

    async def answer(self, replica: Replica, request: PictureRequest) -> Item:
        assert replica.painter
        return {"images": await replica.painter.draw(request)}

    def shape(self, settings: FrontSettings, body: Images, version: str, item: Item) -> Answer:
        head = {"created": int(time.time()), "model": body.model, "system_fingerprint": version, "output_format": "png"}
        return {**head, "data": item["images"]}

    def count(self, measures: Measures, key: str, body: Images, answer: Answer) -> None:
        measures.images.labels(key).inc(body.n)
