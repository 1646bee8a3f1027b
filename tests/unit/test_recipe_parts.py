"""Tests the groups of parameters, the frozen modules, and the named parts of the loss of a recipe."""

from __future__ import annotations

import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.plan.model_stats import build, stats_of
from heliostat.plan.zero_layout import slices, usual_groups
from heliostat.recipes import building
from heliostat.recipes.protocol import Batch, Companion, Group, Loss, Part
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.training.worker.objective import Objective
from torch import nn

from tests.unit.build_job import job
from tests.unit.build_least_recipe import KEYS, ROWS, Least

# groups, frozen modules, models beside it ----------------------------------------------------------------------------


class Grouped(Least):
    frozen = ("0",)

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        return Group(weight_decay=0.3, lr=0.1) if name.startswith("3.") else super().group(name, shape)

    def companions(self) -> dict[str, Companion]:
        return {"judge": Companion(100, every_step=False), "encoder": Companion(7)}


def test_a_recipe_groups_its_parameters_and_freezes_modules():
    """Each group has a weight decay and a learning rate. A frozen module is in no group, and has no gradient and no dropout."""
    recipe = Grouped(job())
    model = building.build(recipe)
    groups = building.parameter_groups(model, 0.05, recipe)
    named = {p: n for n, p in model.named_parameters()}
    told = [([named[p] for p in g["params"]], g["weight_decay"], g["lr_scale"]) for g in groups]
    assert told == [(["1.weight", "1.bias"], 0.0, 1.0), (["3.weight", "3.bias"], 0.3, 0.1)]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]
    model.train()
    building.rest(recipe, model)
    assert [m.training for m in model] == [False, True, True, True]


def test_groups_of_a_recipe_that_says_nothing_are_matrices_and_vectors_even_without_weight_decay():
    """Optimizers keep this order, for any weight decay, because checkpoints and losses depend on it."""
    recipe = CausalLM(job())
    model = building.build(recipe)
    for decay in (0.1, 0.0):
        first, second = building.parameter_groups(model, decay, recipe)
        assert {p.dim() for p in first["params"]} == {2} and {p.dim() for p in second["params"]} == {1}
        assert (first["weight_decay"], second["weight_decay"]) == (decay, 0.0)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert [names for _, names in building.grouped(recipe, shapes)] == usual_groups(shapes)


def test_the_plan_knows_groups_frozen_modules_and_models_beside():
    recipe = Grouped(job())
    found = stats_of(recipe, build(recipe))
    assert found.frozen == {"0.weight", "0.bias"} and found.frozen_models == (7, 107)
    owned = slices(found.trained, 1, 2, found.groups)
    assert owned == [[("1.weight", 0, 8), ("3.weight", 0, 10)], [("1.bias", 0, 8), ("3.weight", 10, 6), ("3.bias", 0, 2)]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frozen": ("encoder",)}, "frozen names 'encoder', but the model has no such submodule"),
        ({"group": lambda self, name, shape: Group(lr=-1.0)}, r"group returns lr -1\.0\. Return a finite number of at least 0"),
        ({"group": lambda self, name, shape: Group(weight_decay=float("nan"))}, "group returns weight_decay nan"),
    ],
)
def test_groups_and_names_that_make_no_sense_are_refused(changes, says):
    recipe = type("Wrong", (Least,), changes)(job())
    with pytest.raises(ConfigError, match=rf"^recipe: Wrong\.{says}"):
        building.parameter_groups(building.build(recipe), 0.1, recipe)


# parts of the loss ---------------------------------------------------------------------------------------------------


class Parts(Least):
    given: dict[str, float] = {"distance": 0.5, "accuracy": 0.0}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        made = model(batch["x"])
        parts = {name: Part(made.square().mean() + i, weight) for i, (name, weight) in enumerate(self.given.items())}
        return Loss(super().loss(model, batch).sum, parts)


def test_parts_are_added_by_their_weight_and_logged_by_their_name():
    """A part of weight 0 is only logged: even a NaN doesn't affect the objective."""
    recipe = Parts(job())
    model = recipe.build().eval()
    batch = recipe.batch(ROWS, KEYS)
    plain, distance = Least.loss(recipe, model, batch).sum, model(batch["x"]).square().mean()
    objective = Objective(recipe)
    share = objective.part(model, batch, 2, 12)
    assert objective.names == ["distance", "accuracy"]
    assert torch.equal(share.objective, plain * (2 / 12) + distance * 0.5) and torch.equal(share.loss, plain)
    assert torch.equal(share.added, torch.stack([distance, distance + 1]) / 2) and not share.added.requires_grad


@pytest.mark.parametrize("name", ["loss", "grad_norm", "two words", "a/b"])
def test_a_part_that_would_hide_another_curve_is_refused(name):
    recipe = Parts(job())
    recipe.given = {name: 1.0}
    with pytest.raises(ConfigError, match=rf"loss returns a part '{name}', which can't be logged as train/"):
        Objective(recipe).part(recipe.build(), recipe.batch(ROWS, KEYS), 1, 1)


def test_parts_that_come_and_go_and_a_loss_of_the_first_form_are_refused():
    recipe = Parts(job())
    model, batch, objective = recipe.build(), recipe.batch(ROWS, KEYS), Objective(recipe)
    objective.part(model, batch, 1, 1)
    recipe.given = {"distance": 1.0}
    with pytest.raises(ConfigError, match=r"loss returned the parts \['distance', 'accuracy'\] before, and \['distance'\] now"):
        objective.part(model, batch, 1, 1)
    recipe.loss = lambda model, batch: torch.zeros(())  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"loss returned a Tensor, expected a Loss \(docs/guides/recipe\.md\)"):
        Objective(recipe).part(model, batch, 1, 1)
