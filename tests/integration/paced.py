"""Defines recipes with the losses of `CausalLM`: slow ones, so that a fault can strike during a step, and ones without an
exported model."""

import time
from typing import Any

import numpy as np
import torch
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.recipes.protocol import Batch, Evaluates, Loss, Recipe
from heliostat.recipes.text.causal_lm import CausalLM

PACED = {"recipe": "tests.integration.paced:Paced"}
PLAIN = {"recipe": "tests.integration.paced:Plain"}
SET_PLAIN = [f"recipe={PLAIN['recipe']}", "mlflow.register=null"]
PACED_PLAIN = {"recipe": "tests.integration.paced:PacedPlain"}
PAUSE_S = 0.15


class Paced(CausalLM):
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        time.sleep(PAUSE_S)
        return super().loss(model, batch)


class Plain(Recipe, Evaluates):
    """Exports nothing. For a run whose model no test needs, this saves seconds after the last step."""

    kind = CausalLM.kind
    scores = CausalLM.scores

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.text = CausalLM(job)
        self.terms_per_sample = self.text.terms_per_sample

    def bind(self, sources: list[Manifest]) -> None:
        self.text.bind(sources)

    def build(self) -> torch.nn.Module:
        return self.text.build()

    def batch(self, content: np.ndarray, keys: np.ndarray) -> Batch:
        return self.text.batch(content, keys)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        return self.text.loss(model, batch)

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return self.text.evaluate(model, batch)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.text.metrics(sums)

    def describe(self, content: Any) -> str:
        return self.text.describe(content)


class PacedPlain(Plain):
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        time.sleep(PAUSE_S)
        return super().loss(model, batch)
