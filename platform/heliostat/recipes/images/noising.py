"""Computes the forward process, which adds noise to images, and the network's target. All functions on tensors are pure.

Diffusion (Ho et al. 2020, arXiv 2006.11239): q(x_t | x_0) is normal with mean sqrt(a_t) x_0 and variance 1 - a_t. Here, a_t is
the product of 1 - beta up to t. The network predicts the noise (`epsilon`) or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0 (Salimans
and Ho 2022, arXiv 2202.00512).

Flow matching (Liu et al. 2022, arXiv 2209.03003): x_s = (1 - s) x_0 + s noise, with s in [0, 1]. The network predicts the
velocity noise - x_0 (`flow`), or the image x_0 (`x`; Li and He 2025, arXiv 2511.13720). The velocity of a predicted image is
(x_s - x_0) / s. So with `x`, the loss is the velocity's: the squared error of the image, divided by max(s, time_floor)^2.

`min_snr` weights the loss (Hang et al. 2023, arXiv 2303.09556): the squared error of the image that follows from the prediction
has the weight min(SNR, gamma). `zero_terminal_snr` (Lin et al. 2023, arXiv 2305.08891) makes the last step pure noise. With both
options, the weight of the last step would be 0, so the network would never learn this step. So with both options, signal-to-noise
ratios below one count as one in the weight, as in Salimans and Ho's "truncated SNR".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from pydantic import Field, model_validator

from heliostat.errors import ConfigError
from heliostat.recipes.constants import Constant
from heliostat.recipes.images.timesteps import TimestepLaw
from heliostat.schema import Float

SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
FLOW_STEPS = 1000  # the network gets s x 1000 as its timestep
FLOWS = ("flow", "x")


class NoiseObjective(TimestepLaw):
    prediction: Literal["epsilon", "v", "flow", "x"] = "epsilon"
    """Target that the network predicts. `epsilon`: the noise. `v`: the velocity of diffusion. `flow`: the velocity of flow
    matching, which is noise minus image. `x`: the image, trained by flow matching."""
    time_floor: Float = Field(default=0.05, gt=0, le=1)
    """Smallest time that divides the error of a predicted image. Needs `prediction: x`."""
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    """Noise schedule: how the noise grows over the steps. Not used with flow."""
    beta_start: Float = Field(default=1e-4, gt=0, lt=1)
    """Variance of the noise that the first step adds. Not used with flow."""
    beta_end: Float = Field(default=0.02, gt=0, lt=1)
    """Variance of the noise that the last step adds. Not used with flow."""
    steps: int = Field(default=1000, gt=1)
    """Number of steps of the forward process."""
    zero_terminal_snr: bool = False
    """Rescales the schedule so that the last step is pure noise. Needs `prediction: v`."""
    min_snr: Float | None = Field(default=None, gt=0)
    """Gamma of the min-SNR loss weight, for every prediction. With `zero_terminal_snr`, the signal-to-noise ratio counts as at
    least 1. Unset: all steps have the same weight."""
    noise_offset: Float = Field(default=0.0, ge=0)
    """Fraction of the noise that is constant over each channel. Not used with flow."""

    @model_validator(mode="after")
    def _consistent(self) -> NoiseObjective:
        flow = self.prediction in FLOWS
        if flow and (self.zero_terminal_snr or self.noise_offset):
            raise ValueError("zero_terminal_snr and noise_offset aren't supported with flow matching. Remove these keys")
        if not flow and (self.timesteps != "uniform" or self.shift != 1.0):
            raise ValueError("timesteps and shift need flow matching. Remove timesteps and shift, or set prediction to flow or x")
        if self.prediction != "x" and "time_floor" in self.model_fields_set:
            raise ValueError("time_floor needs prediction 'x'. Remove time_floor, or set prediction: x")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr needs prediction 'v', because the last step is pure noise, and a network that "
                "predicts noise learns nothing from this step. Set prediction: v"
            )
        return self


class Process:
    """Computes an objective's forward process. Times `t` are steps (int64) for diffusion, s in [0, 1] for flow matching."""

    def __init__(self, objective: NoiseObjective) -> None:
        self.objective = objective
        self.flow = objective.prediction in FLOWS
        self.predicts_image = objective.prediction == "x"
        self._alphas = None if self.flow else Constant(self.scheduler("ddpm").alphas_cumprod.double())

    def scheduler(self, name: str, clip: bool = False) -> Any:
        """Makes diffusers' scheduler for a sampler. Raises ConfigError if the sampler doesn't support the prediction. `clip`:
        clips x_0 to [-1, 1]."""
        valid = ("euler",) if self.flow else ("ddpm", "ddim", "dpm++")
        if name not in valid:
            what = f"a model with prediction {self.objective.prediction!r}"
            raise ConfigError(f"sampler: {name!r} doesn't support {what}. Use {' or '.join(valid)}")
        o = self.objective
        if self.flow and o.base_size:
            return FlowMatchEulerDiscreteScheduler(FLOW_STEPS, use_dynamic_shifting=True, base_image_seq_len=o.base_size**2)
        if self.flow:
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=FLOW_STEPS, shift=o.shift)
        settings: dict[str, Any] = {
            "num_train_timesteps": o.steps,
            "beta_schedule": o.schedule,
            "beta_start": o.beta_start,
            "beta_end": o.beta_end,
            "prediction_type": "v_prediction" if o.prediction == "v" else "epsilon",
            "rescale_betas_zero_snr": o.zero_terminal_snr,
            "timestep_spacing": "trailing",  # begins at the last step, for any number of steps
        }
        if name in ("ddpm", "ddim"):
            settings["clip_sample"] = clip
        if name == "ddim":
            settings["set_alpha_to_one"] = True
        return SAMPLERS[name](**settings)

    def times(self, uniform: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Maps uniform numbers in [0, 1) to times `t`: steps (int64) for diffusion, s in [0, 1] for flow matching. `size`: height
        and width of the tensor that gets the noise, for `shift: auto`."""
        return self.objective.times(uniform, size) if self.flow else (uniform * self.objective.steps).long()

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """Converts times to the timesteps that the network gets as input: 1000 s for flow matching, the steps themselves for
        diffusion."""
        return t * FLOW_STEPS if self.flow else t

    def coefficients(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the image's factor and the noise's factor in the noisy image, each fp32 [n]."""
        if self.flow:
            return (1 - t).float(), t.float()
        assert self._alphas is not None
        a = self._alphas.on(t.device)[t]
        return a.sqrt().float(), (1 - a).sqrt().float()

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        image, part = (c.view(-1, *[1] * (clean.dim() - 1)) for c in self.coefficients(t))
        return image * clean + part * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Computes the network's target: the noise, v, noise - image, or the image."""
        if self.predicts_image:
            return clean
        if self.flow:
            return noise - clean
        if self.objective.prediction == "epsilon":
            return noise
        image, part = (c.view(-1, *[1] * (clean.dim() - 1)) for c in self.coefficients(t))
        return image * noise - part * clean

    def errors(self, prediction: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Computes each sample's mean squared error, fp32 [n]. The error of a predicted image becomes the error of the velocity
        that follows from the image."""
        errors = (prediction.float() - self.target(clean, noise, t)).square().flatten(1).mean(1)
        return errors / t.clamp(min=self.objective.time_floor).square() if self.predicts_image else errors

    def velocity(self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Converts predictions of flow matching to velocities, fp32."""
        if not self.predicts_image:
            return prediction.float()
        return (noisy - prediction.float()) / t.clamp(min=self.objective.time_floor).view(-1, *[1] * (noisy.dim() - 1))

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """Computes the weight of each sample's squared error in the loss, fp32 [n]. `t`: the samples' times [n]."""
        if self.objective.min_snr is None:
            return torch.ones(len(t), device=t.device)
        image, part = self.coefficients(t)
        snr = (image / part) ** 2
        floor = 1.0 if self.objective.zero_terminal_snr else 0.0
        capped = snr.clamp(min=floor).clamp(max=self.objective.min_snr)
        if self.flow:  # `errors` are those of the velocity, which are the image's divided by this square
            return capped * t.clamp(min=self.objective.time_floor if self.predicts_image else 0.0).square()
        return capped / snr if self.objective.prediction == "epsilon" else capped / (snr + 1)
