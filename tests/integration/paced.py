"""A recipe that takes its time, so that there is some to strike in; the losses are the same."""

import time

import torch
from heliostat.recipes.protocol import Loss
from heliostat.recipes.text.causal_lm import CausalLM

PACED = {"recipe": "tests.integration.paced:Paced"}


class Paced(CausalLM):
    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
        time.sleep(0.15)
        return super().loss(model, batch)
