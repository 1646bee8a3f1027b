"""Draws images with an exported model: `heliostat generate MODEL --prompt "..." --out x.png`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from heliostat.config.schema import Float, Strict, validate
from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.recipes.images import diffusers_folder
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.gallery import grid, png
from heliostat.recipes.images.noising import Process
from heliostat.recipes.images.pipeline import generators
from heliostat.recipes.protocol import Generated, Request
from heliostat.storage import Location

AT_ONCE = 16


class Drawing(Strict):
    """Describes how an image is drawn; what is left out is taken from the job's `samples`."""

    steps: int | None = Field(None, ge=1)
    guidance: Float | None = Field(None, ge=0)
    sampler: Literal["ddpm", "ddim", "dpm++", "euler"] | None = None
    grid: int = Field(1, ge=1)
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)


class ImageGenerator:
    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.options = validate(Drawing, options, "generate")
        model = validate(Model, exported.read(folder).job["model"], str(folder / exported.RECORD))  # type: ignore[index]
        self.latent = (folder / "vae").is_dir()
        blocks = json.loads((folder / "vae/config.json").read_text())["block_out_channels"] if self.latent else [0]
        factor = 2 ** (len(blocks) - 1)
        for side in ("width", "height"):
            if (value := getattr(self.options, side)) and value % factor:
                raise ConfigError(f"generate: {side}: {value} is no multiple of {factor} pixels, the side of a latent")
        self.steps = self.options.steps or model.samples.steps
        self.guidance = model.samples.guidance if self.options.guidance is None else self.options.guidance
        self.scheduler = None
        if self.options.sampler:
            self.scheduler = Process(model.objective).scheduler(self.options.sampler, clip=not self.latent)
        self.pipeline: Any = diffusers_folder.load(folder)
        if self.scheduler is not None:
            self.pipeline.scheduler = self.scheduler

    def __call__(self, requests: list[Request]) -> list[Generated]:
        for request in requests:
            if request.out is None:
                raise ConfigError("--out: say where the image goes, such as --out x.png")
        wanted = [(r.prompt, r.seed + i) for r in requests for i in range(self.options.grid)]
        drawn: list[np.ndarray] = []
        for first in range(0, len(wanted), AT_ONCE):
            part = wanted[first : first + AT_ONCE]
            made = self.pipeline(
                [p for p, _ in part], self.options.height, self.options.width, self.steps, self.guidance,
                generators([seed for _, seed in part]),
            )  # fmt: skip
            drawn += [np.asarray(image) for image in made.images]
        return [self._answer(r, drawn[i * self.options.grid : (i + 1) * self.options.grid]) for i, r in enumerate(requests)]

    def _answer(self, request: Request, images: list[np.ndarray]) -> Generated:
        place = Location(str(request.out)).ending(".png")
        place.write(png(grid(images, 4)))
        facts = {"file": place.uri, "seed": request.seed, "steps": self.steps, "guidance": self.guidance, "images": len(images)}
        return Generated(request.prompt, f"{request.prompt!r} is in {place}", facts)
