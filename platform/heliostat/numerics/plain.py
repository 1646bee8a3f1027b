"""Runs the small job's steps in one plain torch process, in fp32, with autograd, a plain loss, and torch's own clipping and
optimizer.

Each step begins from the engine's weights, rounded as in the engine's forward pass. So a comparison shows only the difference of
that step. The optimizer gets the engine's gradient, so its update doesn't depend on the precision.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heliostat.config.spec import Job
from heliostat.data import content
from heliostat.data.dataset import DataPlan
from heliostat.numerics import alone, compare, play
from heliostat.numerics.rows import LIMITS, DifferenceRow
from heliostat.numerics.small import STEPS
from heliostat.recipes import building
from heliostat.recipes.protocol import Batch, CouplesSamples, Recipe
from heliostat.training.worker.coupled import objective
from heliostat.training.worker.micro_batches import BatchPlan

WAIT_S = 300.0  # maximum wait for the workers' next step


class PlainLoop:
    def __init__(self, job: Job, plan: DataPlan, recipe: Recipe) -> None:
        self.job, self.recipe, self.type = job, recipe, play.TYPES[job.train.precision]
        self.definition = alone.of(recipe)
        self.samples, self.batch_plan = play.dealt(plan, 0, 1, 0), BatchPlan(job, plan)
        torch.manual_seed(job.train.seed)
        self.model = building.build(recipe)
        settings = job.train.optimizer
        self.optimizer = settings.build(
            building.parameter_groups(self.model, settings.weight_decay, recipe, settings.orthogonalizes)
        )
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def initial(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.trained.items()}

    def put(self, weights: compare.Tensors, rounded: bool = True) -> None:
        """Writes weights into the model. `rounded`: whether to round the weights to the precision of the engine's forward
        pass."""
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(weights[name].to(self.type) if rounded else weights[name])

    def next_micros(self, step: int) -> list[tuple[int, Any]]:
        """Makes the next step's micro-batches, one per virtual rank, each with its seed."""
        mine, size = self.samples.next_step(), self.job.train.micro_batch_size
        keys = self.batch_plan.keys(step, mine.lanes)
        parts = zip(content.split(mine.content, size), content.split(keys, size), strict=True)
        return [(self.batch_plan.seed(step, mine.lanes, i), self.definition.batch(*part)) for i, part in enumerate(parts)]

    def gradients(self, micros: list[tuple[int, Any]]) -> tuple[float, list[dict[str, torch.Tensor]]]:
        """Computes the loss, and the gradient of the objective for each replica. A replica is a worker, or a group of workers
        that share samples."""
        terms = sum(self.terms(micro) for _, micro in micros)
        if isinstance(self.recipe, CouplesSamples):
            return self._coupled(self.recipe, micros, terms)
        total, parts, routed = 0.0, [], list[torch.Tensor]()
        replicas = self.job.replicas
        for replica in range(replicas):
            self.model.zero_grad()
            for seed, micro in micros[replica::replicas]:
                torch.manual_seed(seed)
                loss = self.definition.loss(self.model, micro)
                minimised = loss.sum / terms
                for part in loss.parts.values():
                    minimised = minimised + part.value * (part.weight / len(micros))
                minimised.backward()
                total += loss.sum.item() / terms
                routed += [] if loss.routed is None else [loss.routed]
            parts.append(self._kept())
        if self.recipe.balances:
            self.recipe.balance(self.model, torch.stack(routed).sum(0))
        return total, parts

    def _coupled(
        self, recipe: CouplesSamples, micros: list[tuple[int, Batch]], terms: int
    ) -> tuple[float, list[dict[str, torch.Tensor]]]:
        """Computes the same as `gradients`, for a loss that couples all samples of the step (contrastive). A replica's gradient
        is the contribution of the replica's samples."""
        represented = []
        for seed, micro in micros:
            with torch.no_grad():
                completed = recipe.complete(micro)
            torch.manual_seed(seed)
            represented.append(recipe.represent(self.model, completed))
        leaves = [{n: t.detach().requires_grad_(t.is_floating_point()) for n, t in one.items()} for one in represented]
        result = recipe.couple({name: torch.cat([one[name] for one in leaves]) for name in leaves[0]})
        objective(result, terms).backward()
        parts = []
        for replica in range(self.job.replicas):
            self.model.zero_grad()
            for one, leaf in zip(represented[replica :: self.job.replicas], leaves[replica :: self.job.replicas], strict=True):
                shares = [(one[name], grad) for name in one if (grad := leaf[name].grad) is not None]
                torch.autograd.backward([tensor for tensor, _ in shares], [grad for _, grad in shares])
            parts.append(self._kept())
        return result.sum.item() / terms, parts

    def _kept(self) -> dict[str, torch.Tensor]:
        return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.trained.items()}

    def terms(self, micro: Any) -> int:
        return (self.recipe.terms_per_sample or 0) * self.job.train.micro_batch_size or self.definition.terms(micro)

    def step(self, weights: compare.Tensors, gradients: compare.Tensors) -> dict[str, torch.Tensor]:
        """Runs the optimizer from these weights with these gradients. Returns each parameter's update."""
        self.put(weights, rounded=False)
        for name, p in self.trained.items():
            p.grad = gradients[name].clone()
        if self.job.train.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self.job.train.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.train.optimizer.lr * group["lr_scale"]
        self.optimizer.step()
        return {name: p.detach() - weights[name] for name, p in self.trained.items()}


def play_plain(job: Job, plan: DataPlan, recipe: Recipe, folder: Path) -> None:
    """Runs all steps in the plain process while the workers run the same steps. Writes the differences to `folder`."""
    limits, plain = LIMITS[job.train.precision], PlainLoop(job, plan, recipe)
    begun, grads, updates = (
        DifferenceRow("initial weights", 0.0),
        DifferenceRow("gradients", limits.gradient),
        DifferenceRow("updates", limits.update),
    )
    weights, before = play.read(folder / "weights-0", WAIT_S), None
    for name, right in plain.initial().items():
        begun.add(1, name, compare.relative(weights[name], right.to(plain.type).float()))
    losses = []
    for step in range(STEPS):
        plain.put(weights)
        loss, parts = plain.gradients(plain.next_micros(step))
        whole = {n: torch.stack([part[n] for part in parts]).sum(0) for n in parts[0]}
        gradients = play.read(folder / f"gradients-{step}", WAIT_S)
        _gradients(grads, step + 1, gradients, whole, parts, before, limits.floor)
        following = play.read(folder / f"weights-{step + 1}", WAIT_S)
        _updates(updates, step + 1, weights, following, plain.step(weights, gradients))
        weights, before = following, whole
        losses.append(loss)
    (folder / "plain.json").write_text(json.dumps({"losses": losses, "rows": [row.dump() for row in (begun, grads, updates)]}))


def _gradients(
    row: DifferenceRow,
    step: int,
    gradients: compare.Tensors,
    right: compare.Tensors,
    parts: list[dict[str, torch.Tensor]],
    before: compare.Tensors | None,
    floor: float,
) -> None:
    least = compare.floors(right, floor)
    for name, one in right.items():
        old = before[name] if before else None
        explained = partial(compare.explain_gradient, gradients[name], one, [part[name] for part in parts], old, row.limit)
        row.add(step, name, compare.relative(gradients[name], one, least[name]), explained)


def _updates(row: DifferenceRow, step: int, weights: compare.Tensors, following: compare.Tensors, right: compare.Tensors) -> None:
    for name, one in right.items():
        update, least = following[name] - weights[name], float(weights[name].norm()) * 2**-23 / row.limit
        explained = partial(compare.explain_update, update, one, row.limit)
        row.add(step, name, compare.relative(update, one, least), explained)
