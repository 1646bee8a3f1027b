"""Runs a recipe's batch, loss, backward pass, evaluation, and gallery on the CPU and on the simulated device, without
DeepSpeed."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from heliostat.config.spec import Job
from heliostat.data import content
from heliostat.data.dataset import open_dataset, plan
from heliostat.data.device_streams import on_device
from heliostat.data.manifest import read as read_manifest
from heliostat.numerics.play import dealt
from heliostat.recipes import building
from heliostat.recipes.loading import load
from heliostat.recipes.protocol import Draws, Evaluates, Recipe
from heliostat.training.worker.micro_batches import BatchPlan

from tests.twin import cases, device, traffic
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

WAITS = ("read", "synchronization", "blocking upload", "unpinned upload")


def batches(given: Job) -> tuple[Recipe, list[dict[str, torch.Tensor]]]:
    """Returns the recipe and the micro-batches of the first step."""
    sources = [read_manifest(location) for location in given.sources]
    data_plan, recipe = plan(given, sources), load(given, sources)
    open_dataset(data_plan)
    samples = dealt(data_plan, 0, 1, 0).next_step()
    keys, size = BatchPlan(given, data_plan).keys(0, samples.lanes), given.train.micro_batch_size
    parts = zip(content.split(samples.content, size), content.split(keys, size), strict=True)
    return recipe, [recipe.batch(part, numbers) for part, numbers in parts]


def trained(recipe: Recipe, model: Any, micros: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the loss and the gradients of a step, on the model's device."""
    model.zero_grad()
    total = torch.zeros((), device=next(model.parameters()).device)
    for seed, micro in enumerate(on_device(micros, total.device, recipe.complete)):
        torch.manual_seed(seed)
        loss = recipe.loss(model, micro)
        objective = loss.sum + sum(part.value * part.weight for part in loss.parts.values())
        objective.backward()
        total += loss.sum.detach()
    return {"loss": total, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def evaluated(recipe: Recipe, model: Any, micros: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the scores of the first micro-batch, and a picture of the gallery."""
    scores: dict[str, torch.Tensor] = {}
    where = next(model.parameters()).device
    with torch.no_grad():
        if isinstance(recipe, Evaluates):
            scores |= recipe.evaluate(model, next(iter(on_device(micros[:1], where))))
        if isinstance(recipe, Draws) and (gallery := recipe.gallery()):
            scores["picture"] = torch.from_numpy(gallery.draw(model, where, [0])[0]).float()
    return scores


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Returns the norm of the difference of two sets of tensors, each as one vector, relative to the norm of the first."""
    assert one.keys() == other.keys() and one
    one = {name: values for name, values in one.items() if values.is_floating_point()}
    flat = [torch.cat([values[name].detach().cpu().double().flatten() for name in one]) for values in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


def compared(name: str, folder: Path) -> dict[str, Any]:
    """Returns a case's differences between the CPU and the simulated device, and the traffic of a step after the first."""
    recipe, micros = batches(cases.made(name, folder))
    torch.manual_seed(0)
    model = recipe.build()
    right, right_scores = trained(recipe, model, micros), evaluated(recipe, model.eval(), micros)
    right = {key: value.clone() for key, value in right.items()}
    model.train().cuda()
    for key, p in model.named_parameters():
        assert p.is_cuda, key
    mine = trained(recipe, model, micros)
    told = {"case": name, "gradients": difference(right, mine), "micro_batches": len(micros)}
    told |= {"scores": difference(right_scores, evaluated(recipe, model.eval(), micros))}
    model.train().bfloat16()
    with traffic.recorded() as step:
        trained(recipe, model, micros)
    return told | {"waits": step.places(*WAITS), "counts": {kind: step.count(kind) for kind in traffic.MEANING}}


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {}, "sgd": {"momentum": 0.8}, "rmsprop": {}, "lion": {}, "schedule_free": {}, "muon": {"adamw_lr": 0.02}
}  # fmt: skip


def optimized(name: str) -> dict[str, Any]:
    """Returns an optimizer's difference between the CPU and the simulated device after three steps, and the traffic of the
    third."""
    keys = {"name": name, "lr": 0.02, "weight_decay": 0.1, **OPTIMIZERS[name]}
    settings = job(**{"train.optimizer": keys, "train.schedule": {"name": "constant", "warmup_steps": 2}}).train.optimizer
    weights: list[dict[str, torch.Tensor]] = []
    waits = ""
    for place in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
        recipe = Around(lambda model=model: model)
        groups = building.parameter_groups(model, settings.weight_decay, recipe, settings.orthogonalizes)
        model.to(place)
        optimizer = settings.build([{**group, "warmup": 2} for group in groups])
        for number in range(3):
            values = torch.randn(32, 8, generator=torch.Generator().manual_seed(number)).to(place)
            optimizer.zero_grad()
            model(values).square().mean().backward()
            with traffic.recorded() as seen:
                optimizer.step()
        waits = seen.places(*WAITS)
        weights.append(dict(model.named_parameters()))
    return {"optimizer": name, "weights": difference(*weights), "waits": waits}


def main(arguments: list[str]) -> int:
    """Prints a line of JSON for each case, or the named ones, and for each optimizer."""
    torch.set_num_threads(1)
    device.start()
    with tempfile.TemporaryDirectory() as folder:
        cases.prepare(Path(folder))
        for name in arguments or cases.EVERY:
            sys.stdout.write(json.dumps(compared(name, Path(folder))) + "\n")
    for name in () if arguments else OPTIMIZERS:
        sys.stdout.write(json.dumps(optimized(name)) + "\n")
    return 0
