"""Pairs images with near noise (immiscible diffusion). Each image then meets only a part of the noise, so the network has fewer
images to tell apart in a noisy input.

- `candidates` (Li et al. 2025, arXiv 2505.18521): draws several noises for each image, and takes the nearest.
- `group` (Li et al. 2024, arXiv 2406.12303): assigns the noises of consecutive samples to their images, so that the sum of the
  squared distances is minimal. The noise of a group stays normal. The host computes the assignments, before the batch is on the
  device. Only if an autoencoder encodes the images in each step, the host waits for them in every micro-batch.

Held-out scores use noise that doesn't depend on the image, as samplers do.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator

from heliostat import extras
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.recipes.counter_random import normals
from heliostat.recipes.images.groups import require_groups
from heliostat.schema import Strict

STREAM = 1 << 16  # the first stream of random numbers for further candidates


class Immiscible(Strict):
    candidates: int | None = Field(default=None, gt=1)
    """Number of noises to draw for each image; the nearest is used. The papers' experiments use 4."""
    group: int | None = Field(default=None, gt=1)
    """Number of consecutive samples whose noises are assigned to their images. Must divide `train.micro_batch_size`, and the
    samples of a virtual rank."""

    @model_validator(mode="after")
    def _one_method(self) -> Immiscible:
        if (self.candidates is None) == (self.group is None):
            raise ValueError("set either candidates or group")
        return self

    def require(self, job: Job, noise_offset: float) -> None:
        """Raises ConfigError if the job's noise or micro-batches don't support the method."""
        if noise_offset:
            raise ConfigError("model.immiscible: not supported with model.objective.noise_offset. Remove one of the two keys")
        if self.group:
            extras.require("images", "sklearn", what="model.immiscible.group")  # contains scipy
            require_groups("model.immiscible.group", self.group, job)

    def assigned(self, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Returns the index of each image's noise, int64 [n], so that the sum of the squared distances of each group is minimal.
        For the arguments, see `choose`."""
        size, out = self.group or 1, list[torch.Tensor]()
        for first in range(0, len(image), size):
            images, noises = (values[first : first + size].flatten(1).double() for values in (image, noise))
            out.append(first + assignment(images @ noises.T))
        return torch.cat(out)

    def choose(self, seed: int, keys: torch.Tensor, image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Chooses the noise of each image. `noise`: the first candidate, or the noises to assign; fp32 [n, ...], as `image`."""
        if self.candidates:
            return nearest_noise(seed, keys, image, noise, self.candidates)
        return noise[self.assigned(image, noise)]


def nearest_noise(seed: int, keys: torch.Tensor, image: torch.Tensor, noise: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the nearest of `count` noises for each image. The first candidate is `noise`. `seed` and `keys` (int64 [n])
    determine the others."""
    least = _distances(image, noise)
    for number in range(count - 1):
        other = normals(seed, keys, STREAM + number, noise[0].numel()).view_as(noise)
        distances = _distances(image, other)
        noise = torch.where((distances < least).view(-1, *[1] * (noise.dim() - 1)), other, noise)
        least = torch.minimum(distances, least)
    return noise


def _distances(image: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return (image - noise).square().flatten(1).double().sum(1)


@torch.library.custom_op("heliostat::assignment", mutates_args=())
def assignment(products: torch.Tensor) -> torch.Tensor:
    """Assigns a column to each row, so that the sum of the chosen values is maximal. `products`: fp64 [n, n]. Returns int64 [n].
    Computes on the host."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(products.cpu().numpy(), maximize=True)[1]).to(products.device)


@assignment.register_fake
def _shape_of_assignment(products: torch.Tensor) -> torch.Tensor:
    return products.new_empty(len(products), dtype=torch.long)
