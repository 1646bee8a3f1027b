"""Generates images that show the progress of a text-to-image run, from fixed prompts and seeds. The results are a grid of images,
and the predictions of a classifier.

Conditional accuracy: a classifier that was trained on the real images predicts the label of each image. The score is the fraction
of images whose predicted label is the label of their prompt. The report also shows the classifier's accuracy on held-out real
images, and the chance level.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from heliostat.data.manifest import Manifest
from heliostat.recipes.images import diffusers_folder
from heliostat.recipes.images.config import Features, Model, Sampler
from heliostat.recipes.images.judge import Judge, real_images
from heliostat.recipes.images.noising import Process
from heliostat.recipes.images.parts import Parts
from heliostat.recipes.images.pipeline import denoise, generators

if TYPE_CHECKING:
    from heliostat.recipes.images.quality import Reference

Predictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (noisy tensors, times) -> predictions
SHOWN_SIDE = 64  # pixels; smaller pictures are enlarged in the grid
GAP = 4  # gray pixels after each picture


class DrawingRecipe(Protocol):
    """Lists the attributes of a text-to-image recipe that a gallery needs."""

    model: Model
    parts: Parts
    process: Process
    sampler: Sampler
    sources: list[Manifest]

    def sampler_of(self, model: nn.Module, device: torch.device | str) -> Callable[[list[str]], Predictor]: ...
    def pixels_of(self, sampled: torch.Tensor) -> np.ndarray: ...


class PromptGallery:
    def __init__(self, recipe: DrawingRecipe) -> None:
        self.recipe, self.samples = recipe, recipe.model.samples
        self.prompts = [p.text for p in self.samples.prompts]
        self.labels = [p.label for p in self.samples.prompts]
        self.count = len(self.prompts) * self.samples.per_prompt
        self._judge: Judge | None = None
        self._reference: Reference | None = None  # features of real images, for FID and KID

    def item(self, number: int) -> tuple[str, int]:
        """Returns an image's prompt and seed."""
        return self.prompts[number // self.samples.per_prompt], self.samples.seed + number

    def draw(self, model: nn.Module, device: torch.device | str, numbers: list[int]) -> list[np.ndarray]:
        recipe, items = self.recipe, [self.item(n) for n in numbers]
        predictor_of = recipe.sampler_of(model, device)
        scheduler = recipe.process.scheduler(recipe.sampler, clip=recipe.parts.vae_config is None)
        sampled = denoise(
            predictor_of([p for p, _ in items]),
            scheduler,
            (len(items), *recipe.parts.shape()),
            self.samples.steps,
            self.samples.guided,
            generators([s for _, s in items]),
            device,
            recipe.process.predicts_image,
            clip=recipe.parts.vae_config is None,
        )
        pictures = list(recipe.pixels_of(sampled))
        recipe.parts.rest()
        return pictures

    def judge(
        self, pictures: list[np.ndarray], progressed: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], dict[str, bytes]]:
        scores: dict[str, float] = {}
        if self.samples.judge:
            wanted = [self.labels[i // self.samples.per_prompt] for i in range(self.count)]
            labeled = [i for i, label in enumerate(wanted) if label is not None]
            said = self.judge_of().says([pictures[i] for i in labeled])
            scores["conditional_accuracy"] = float(np.mean([s == wanted[i] for s, i in zip(said, labeled, strict=True)]))
            scores["classifier_accuracy"] = self.judge_of().accuracy
            scores["chance"] = 1 / len(self.judge_of().labels)
        if self.samples.features:
            scores |= self._reference_of(self.samples.features, progressed).distances(pictures, progressed)
        return scores, {"samples": png(grid(pictures, self.samples.per_prompt))}

    def _reference_of(self, features: Features, progressed: Callable[[], None]) -> Reference:
        if self._reference is None:
            from heliostat.recipes.images.quality import Reference

            self._reference = Reference(features.pretrained, self.recipe.sources, features.images, progressed)
        return self._reference

    def judge_of(self) -> Judge:
        if self._judge is None:
            self._judge = Judge(*real_images(self.recipe.sources))
        return self._judge

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Generates one image for each prompt with the exported model.

        Returns each prompt with a text: the label that the classifier predicts for the image, or the image's size if there is no
        classifier.
        """
        pipeline = diffusers_folder.load(folder)
        draws = generators([self.samples.seed + i for i in range(len(self.prompts))])
        guidance = {f"guidance_{name}": value for name, value in self.samples.guided._asdict().items()}
        pictures = pipeline(self.prompts, num_inference_steps=self.samples.steps, generator=draws, **guidance)
        if not self.samples.judge:
            return [(p, f"  ({image.size[0]}x{image.size[1]})") for p, image in zip(self.prompts, pictures.images, strict=True)]
        said = self.judge_of().says([np.asarray(image) for image in pictures.images])
        return [(p, f"  (the classifier sees: {s})") for p, s in zip(self.prompts, said, strict=True)]


def grid(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Arranges images of the same size in rows, and enlarges small images. Returns uint8 [height, width, channels]. A single
    image stays unchanged."""
    pictures = [p if p.ndim == 3 else p[:, :, None] for p in pictures]
    if len(pictures) == 1:
        return pictures[0]
    height, width, channels = pictures[0].shape
    scale = max(1, SHOWN_SIDE // max(height, width))
    height, width = height * scale + GAP, width * scale + GAP
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    out = np.full((rows * height, columns * width, channels), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * height, i % columns * width
        out[y : y + height - GAP, x : x + width - GAP] = picture.repeat(scale, 0).repeat(scale, 1)
    return out


def png(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(out, "PNG")
    return out.getvalue()
