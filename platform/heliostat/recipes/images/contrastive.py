"""Adds the term of contrastive flow matching (Stoica et al. 2025, arXiv 2506.05350) to the loss.

The term pushes the predicted velocity away from the velocity of another sample, its negative: the loss is |v - u|^2 - weight
|v - u'|^2. Here, v is the prediction, u the sample's velocity, and u' that of the negative.

Samples 2i and 2i + 1 of a micro-batch are each other's negatives. Micro-batches and the shares of virtual ranks have an even
number of samples, so the same samples form a pair on any number of workers. A pair with equal captions doesn't count, because the
term would push apart images that belong together. The log has the term as `contrast`, apart from the loss.
"""

from __future__ import annotations

import torch
from pydantic import Field

from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.recipes.images.groups import require_groups
from heliostat.recipes.images.noising import Process
from heliostat.recipes.protocol import Batch, Part
from heliostat.schema import Float, Strict

PAIR = 2


class Contrastive(Strict):
    weight: Float = Field(default=0.05, gt=0, lt=1)
    """Factor of the squared distance to another sample's velocity, which the loss subtracts."""

    def require(self, job: Job, process: Process) -> None:
        """Raises ConfigError unless the job's predictions have velocities, and its samples form pairs."""
        if not process.flow:
            raise ConfigError(
                f"model.contrastive: not supported with prediction {process.objective.prediction!r}, only with flow matching. "
                "Set model.objective.prediction to flow or x, or remove model.contrastive"
            )
        require_groups("model.contrastive", PAIR, job)

    def part(self, process: Process, prediction: torch.Tensor, batch: Batch, t: torch.Tensor) -> dict[str, Part]:
        """Computes the term from a completed batch and the network's prediction, as a part of the loss with a negative weight."""
        return {"contrast": Part(distances(process, prediction, batch, t).mean(), -self.weight)}


def distances(process: Process, prediction: torch.Tensor, batch: Batch, t: torch.Tensor) -> torch.Tensor:
    """Computes each sample's weighted squared distance to the velocity of its negative, fp32 [n]. A pair with equal captions has
    the distance 0."""
    image, noise = batch["image"], batch["noise"]
    velocity = process.velocity(prediction, process.noisy(image, noise, t), t)
    squared = (velocity - negatives(noise - image)).square().flatten(1).mean(1)
    return squared * batch["contrasted"] * process.weights(t)


def negatives(values: torch.Tensor) -> torch.Tensor:
    """Exchanges the values of each pair, [n, ...]. The last sample of an odd number, as in a plan, is its own negative."""
    index = torch.arange(len(values), device=values.device)
    return values[(index ^ 1).clamp(max=len(values) - 1)]


def contrasted(*texts: torch.Tensor) -> torch.Tensor:
    """Checks which samples have another caption than their negatives, bool [n]. `texts`: token ids or embeddings [n, ...] of each
    text encoder."""
    return torch.stack([(text != negatives(text)).flatten(1).any(1) for text in texts]).any(0)
