"""Generates images with an exported model: `heliostat model generate MODEL --prompt "..." --out x.png`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.images import diffusers_folder, frozen_autoencoders
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.grids import grid, png
from heliostat.recipes.images.interval import Interval
from heliostat.recipes.images.noising import Process
from heliostat.recipes.images.pipeline import generators
from heliostat.recipes.protocol import Generated, Request
from heliostat.schema import Float, Strict, validate
from heliostat.storage.locations import Location

AT_ONCE = 16


class PictureOptions(Strict):
    """Describes the options of an image. Missing options come from the job's `samples`."""

    steps: int | None = Field(None, ge=1)
    guidance: Float | None = Field(None, ge=0)
    guidance_interval: Interval | None = None
    guidance_rescale: Float | None = Field(None, ge=0, le=1)
    sampler: Literal["ddpm", "ddim", "dpm++", "euler"] | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)


class Drawing(PictureOptions):
    """Describes an image file: one image, or several side by side."""

    grid: int = Field(1, ge=1)


class ImageCanvas:
    """Generates images with an exported model, which it loads for the first image. `size`: the model's default (width, height) in
    pixels. `defaults`: from the job's `samples`."""

    def __init__(self, folder: Path) -> None:
        job: Any = exported.read(folder).job
        self.folder = folder
        self.model = validate(Model, job["model"], str(folder / exported.RECORD))
        self.latent = (folder / "vae").is_dir()
        self.factor = self.model.patch
        if self.latent:
            self.factor = frozen_autoencoders.factor(json.loads((folder / "vae/config.json").read_text()))
        transformer = folder / "transformer/config.json"
        self.distilled = transformer.exists() and bool(json.loads(transformer.read_text()).get("guidance_embeds"))
        samples = self.model.samples
        self.defaults: dict[str, object] = {"steps": samples.steps, "guidance": samples.guidance,
                                            "guidance_interval": list(samples.guidance_interval),
                                            "guidance_rescale": samples.guidance_rescale}  # fmt: skip

    @cached_property
    def pipeline(self) -> Any:
        return diffusers_folder.load(self.folder)

    @cached_property
    def own(self) -> Any:
        return self.pipeline.scheduler

    @property
    def size(self) -> tuple[int, int]:
        return self.pipeline.side, self.pipeline.side

    def scheduler(self, options: PictureOptions) -> Any:
        """Makes the scheduler of the requested sampler. Returns None if no sampler is requested; the caller then uses the
        export's own scheduler. Raises ConfigError if the model doesn't support the options."""
        for side in ("width", "height"):
            if (value := getattr(options, side)) and value % self.factor:
                raise ConfigError(
                    f"generate: {side}: {value} isn't a multiple of {self.factor} pixels, the side of a latent or a patch. "
                    f"Use a multiple of {self.factor}"
                )
        for key in ("guidance_interval", "guidance_rescale"):
            if self.distilled and getattr(options, key):
                raise ConfigError(f"generate: {key}: not supported by a distilled model. Remove this option")
        if options.sampler is None:
            return None
        return Process(self.model.objective).scheduler(options.sampler, clip=not self.latent)

    def draw(self, prompts: list[str], seeds: list[int], options: Mapping[str, object]) -> list[bytes]:
        drawn = self.pictures(prompts, seeds, validate(PictureOptions, options, "generate"))
        return [png(grid([picture], 1)) for picture in drawn]

    def pictures(self, prompts: list[str], seeds: list[int], options: PictureOptions) -> list[np.ndarray]:
        """Generates an image for each prompt, each from its own seed."""
        own, chosen = self.own, self.defaults | options.model_dump(include=set(self.defaults), exclude_none=True)
        self.pipeline.scheduler = self.scheduler(options) or own
        drawn: list[np.ndarray] = []
        for first in range(0, len(prompts), AT_ONCE):
            output = self.pipeline(
                prompts[first : first + AT_ONCE], options.height, options.width, chosen["steps"], chosen["guidance"],
                chosen["guidance_interval"], chosen["guidance_rescale"], generators(seeds[first : first + AT_ONCE]),
            )  # fmt: skip
            drawn += [np.asarray(image) for image in output.images]
        return drawn


class ImageGenerator:
    def __init__(self, folder: Path, options: Mapping[str, object]) -> None:
        self.options = validate(Drawing, options, "generate")
        self.canvas = ImageCanvas(folder)
        self.canvas.scheduler(self.options)
        self.canvas.pipeline  # noqa: B018 (loads the model, so that its errors are raised now)

    def __call__(self, requests: list[Request]) -> list[Generated]:
        for request in requests:
            if request.out is None:
                raise ConfigError("--out: no file given for the image. Pass a file, for example --out x.png")
        wanted = [(r.prompt, r.seed + i) for r in requests for i in range(self.options.grid)]
        drawn = self.canvas.pictures([p for p, _ in wanted], [seed for _, seed in wanted], self.options)
        return [self._answer(r, drawn[i * self.options.grid : (i + 1) * self.options.grid]) for i, r in enumerate(requests)]

    def _answer(self, request: Request, images: list[np.ndarray]) -> Generated:
        place = Location(str(request.out)).ending(".png")
        place.write(png(grid(images, 4)))
        options = self.options.model_dump(mode="json", include=set(self.canvas.defaults), exclude_none=True)
        facts = {"file": place.uri, "seed": request.seed, **self.canvas.defaults, **options, "images": len(images)}
        return Generated(request.prompt, f"{request.prompt!r}: saved to {place}", facts)
