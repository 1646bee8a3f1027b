"""Draws the times of flow matching. The laws and the shift are those of Esser et al. 2024 (Stable Diffusion 3, arXiv 2403.03206).
All functions on tensors are pure.

A law maps uniform numbers to times s, increasing from 0 (image) to 1 (noise). Its density weights the loss: twice the density is
twice the weight.

- `uniform`: the density is 1.
- `logit_normal`: logit(s) is normal, with the mean `timestep_mean` and the standard deviation `timestep_std`.

The shift moves times towards noise: s becomes a s / (1 + (a - 1) s). A larger image needs more noise to lose as much information.
So with `shift: auto`, a is the square root of the image's positions divided by those of `base_size`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator

from heliostat.schema import Float, Strict


class TimestepLaw(Strict):
    """Defines the keys of the times of flow matching."""

    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the sampled times. `logit_normal` needs flow matching."""
    timestep_mean: Float = 0.0
    """Mean of logit(time) with `timesteps: logit_normal`. A positive mean trains more on noisy images."""
    timestep_std: Float = Field(default=1.0, gt=0)
    """Standard deviation of logit(time) with `timesteps: logit_normal`."""
    shift: Float | Literal["auto"] = 1.0
    """Shifts the times of flow matching towards noise, in training and in sampling; use values above 1 for large images. `auto`:
    the shift follows from each image's size and `base_size`."""
    base_size: int | None = Field(default=None, gt=0)
    """Side of the square image that `shift: auto` doesn't shift. The unit is pixels, or latents with an autoencoder."""

    @model_validator(mode="after")
    def _complete_law(self) -> TimestepLaw:
        for key in ("timestep_mean", "timestep_std"):
            if key in self.model_fields_set and self.timesteps != "logit_normal":
                raise ValueError(f"{key} needs timesteps 'logit_normal'. Remove {key}, or set timesteps: logit_normal")
        if not isinstance(self.shift, str) and self.shift <= 0:
            raise ValueError(f"shift must be above 0, not {self.shift:g}. Use 1 for no shift, or auto")
        if (self.shift == "auto") != (self.base_size is not None):
            raise ValueError(
                "shift 'auto' and base_size need each other. Set base_size to the side of an image that needs no shift, or "
                "remove both keys"
            )
        return self

    def times(self, uniform: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Maps uniform numbers in [0, 1) to times, fp32 [n]. `size`: height and width of the tensor that gets the noise, for
        `shift: auto`."""
        s = self._law(uniform)
        shift = self.shift_of(size)
        return shift * s / (1 + (shift - 1) * s)

    def _law(self, u: torch.Tensor) -> torch.Tensor:
        if self.timesteps == "logit_normal":
            normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
            return torch.sigmoid(self.timestep_std * normal + self.timestep_mean)
        return u

    def shift_of(self, size: Sequence[int] | None) -> float:
        """Computes the shift for a tensor of this height and width. Only `shift: auto` needs `size`."""
        if not isinstance(self.shift, str):
            return self.shift
        assert size and self.base_size
        return math.sqrt(size[0] * size[1]) / self.base_size
