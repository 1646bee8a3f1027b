"""Generates images that show the progress of a text-to-image run, from fixed prompts and seeds. The results are a grid of images,
and the predictions of a classifier.

Conditional accuracy: a classifier that was trained on the real images predicts the label of each image. The score is the fraction
of images whose predicted label is the label of their prompt. The report also shows the classifier's accuracy on held-out real
images, and the chance level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from heliostat.data.dataset import Dataset
from heliostat.data.manifest import Manifest
from heliostat.recipes.comparing import Arrays, ComparesImages, Numbered, WorkerPart
from heliostat.recipes.images import diffusers_folder, quality
from heliostat.recipes.images.config import Model, Sampler
from heliostat.recipes.images.grids import grid, png
from heliostat.recipes.images.judge import Judge, real_images, small
from heliostat.recipes.images.noising import Process
from heliostat.recipes.images.parts import Parts
from heliostat.recipes.images.pipeline import denoise, generators

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
    def pictures_of(self, content: pa.Table, device: torch.device | str) -> list[np.ndarray]: ...


class PromptGallery(ComparesImages):
    def __init__(self, recipe: DrawingRecipe) -> None:
        self.recipe, self.samples = recipe, recipe.model.samples
        self.prompts = [p.text for p in self.samples.prompts]
        self.labels = [p.label for p in self.samples.prompts]
        self.count = len(self.prompts) * self.samples.per_prompt
        self.sets = quality.sets(self.samples)
        self.scored = bool(self.sets) or self.samples.judge
        self._judge: Judge | None = None

    @property
    def guidance(self) -> dict[str, object]:
        """Returns the guidance of the samples, as arguments of a call of the exported pipeline."""
        return {f"guidance_{name}": value for name, value in self.samples.guided._asdict().items()}

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
            classifier = self.judge_of(progressed)
            said = classifier.says([pictures[i] for i in labeled])
            scores["conditional_accuracy"] = float(np.mean([s == wanted[i] for s, i in zip(said, labeled, strict=True)]))
            scores["classifier_accuracy"] = classifier.accuracy
            scores["chance"] = 1 / len(classifier.labels)
        return scores, {"samples": png(grid(pictures, self.samples.per_prompt))}

    @cached_property
    def _quality(self) -> quality.ImageQuality:
        return quality.ImageQuality(self.samples, lambda number: self.item(number)[0], self.recipe.pictures_of)

    def real_features(self, name: str, dataset: Dataset, worker: WorkerPart) -> list[Numbered]:
        return self._quality.real_features(name, dataset, worker)

    def drawn_features(self, drawn: Mapping[int, np.ndarray], worker: WorkerPart) -> list[Numbered]:
        return self._quality.drawn_features(drawn, worker)

    def compare(
        self, pictures: list[np.ndarray], drawn: Arrays, real: Mapping[str, Arrays], dataset: Dataset, worker: WorkerPart
    ) -> tuple[dict[str, float], dict[str, bytes]]:
        return self._quality.compare(pictures, drawn, real, dataset, worker)

    def judge_of(self, progressed: Callable[[], None] = lambda: None) -> Judge:
        if self._judge is None:
            self._judge = Judge(*real_images(self.recipe.sources, progressed=progressed, shrink=small))
        return self._judge

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Generates one image for each prompt with the exported model.

        Returns each prompt with a text: the label that the classifier predicts for the image, or the image's size if there is no
        classifier.
        """
        pipeline = diffusers_folder.load(folder)
        draws = generators([self.samples.seed + i for i in range(len(self.prompts))])
        pictures = pipeline(self.prompts, num_inference_steps=self.samples.steps, generator=draws, **self.guidance)
        if not self.samples.judge:
            return [(p, f"  ({image.size[0]}x{image.size[1]})") for p, image in zip(self.prompts, pictures.images, strict=True)]
        said = self.judge_of().says([np.asarray(image) for image in pictures.images])
        return [(p, f"  (the classifier sees: {s})") for p, s in zip(self.prompts, said, strict=True)]
