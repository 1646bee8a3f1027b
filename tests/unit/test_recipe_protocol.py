"""Tests the required and optional parts of a recipe, and the errors for abilities that a recipe lacks."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from heliostat.data.content import pack, part, unpack
from heliostat.engine import deepspeed_engine
from heliostat.errors import ConfigError
from heliostat.plan.model_stats import activations, build, stats_of
from heliostat.plan.zero_layout import slices, usual_groups
from heliostat.recipes import building, exported
from heliostat.recipes.batches import in_order, pad, taken
from heliostat.recipes.conformance import require_class
from heliostat.recipes.protocol import IGNORED, Batch, Companion, Evaluates, Exports, Group, Loss, Part, Recipe, Weight
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.training.worker.evaluation import dealt_whole
from heliostat.training.worker.objective import Objective
from heliostat.validation import check
from torch import nn

from tests.unit.build_job import job


class Least(Recipe):
    """Implements only the required methods of a recipe."""

    kind = "rows"

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 2))

    def batch(self, content: Any, keys: np.ndarray) -> Batch:
        return {"x": torch.tensor(content["x"].to_pylist()), "labels": torch.tensor(content["label"].to_pylist())}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(nn.functional.cross_entropy(model(batch["x"]), batch["labels"], ignore_index=IGNORED, reduction="sum"))


class Scaled(Least):
    def build(self) -> nn.Module:
        model = super().build()
        model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
        return model


def test_a_parameter_without_a_dimension_is_refused_by_its_name() -> None:
    """DeepSpeed would end with a traceback when it sends the model to all workers."""
    made = job(recipe="x:Scaled", **{"train.zero.stage": 1})
    with pytest.raises(
        ConfigError, match=r"'scale' has no dimensions, .*\. Give this parameter the shape \[1\], or make it a buffer"
    ):
        deepspeed_engine.build_model(made, Scaled(made), {})


ROWS = pa.table({"x": [[0.1, 0.2, 0.3, 0.4]] * 4, "label": [0, 1, IGNORED, 1]})
KEYS = np.arange(4)

MODULE = """
    from heliostat.recipes.protocol import *
    from heliostat.recipes.protocol import Recipe
    import torch

    class Least(Recipe):
        kind = "rows"
        def build(self): return torch.nn.Linear(4, 2)
        def batch(self, content, keys): return {}
        def loss(self, model, batch): return Loss(torch.zeros(()))
        def group(self, name, shape): return Group()

    class Old:
        kind = "rows"
        terms_per_sample = 1
        added = {}
        def __init__(self, job): pass
        def build(self): ...
        def batch(self, content, keys): ...
        def loss(self, model, batch): ...

    class Incomplete(Recipe):
        kind = "rows"
        def build(self): ...

    class Nothing: pass
    class Kindless(Least): kind = "pictures"
    class Losses(Least):
        def losses(self, model, batch): ...
    class Added(Least):
        def __init__(self, job): self.added = {"distance": 0.5}
    class Silent(Least):
        def evaluate(self, model, batch): ...
    class Unserved(Least):
        def serving(self): ...
    class Mute(Least, Serves):
        def save_config(self, folder): ...
        def load(self, folder): ...
    class Unasked(Mute, Generates):
        def generator(folder, options): ...
    class Unmeasured(Least, Evaluates):
        gathered = ("embedding",)
        def evaluate(self, model, batch): ...
    function = len
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_recipes.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "Old",
            r"uses the first recipe protocol\. Derive the class from heliostat\.recipe[\w.]*\.Recipe .* docs/guides/recipe.md",
        ),
        ("Nothing", r"isn't a recipe\. Derive the class from heliostat\.recipe[\w.]*\.Recipe"),
        ("function", "isn't a class"),
        ("Incomplete", "lacks `batch`, `loss`"),
        ("Kindless", "doesn't define `kind`, the kind of its datasets. Set `kind` to 'tokens' or 'rows'"),
        ("Losses", "defines `losses`, which heliostat no longer uses. Remove `losses`: return named parts"),
        ("Added", "defines `added`, which heliostat no longer uses. Remove `added`: return named parts"),
        (
            "Silent",
            r"defines `evaluate`, but heliostat never calls `evaluate`\. Derive the recipe from heliostat\.recipe\S*\.Evaluates",
        ),
        (
            "Unserved",
            r"defines `serving`, but heliostat never calls `serving`\. Derive the recipe from heliostat\.recipe[\w.]*\.Serves",
        ),
        (
            "Mute",
            r"is served through its `generator`, but doesn't define `generator`\. "
            r"Derive the recipe from heliostat\.recipe[\w.]*\.Generates",
        ),
        ("Unasked", "defines no `prompts`, but MLflow logs a prompt with the model"),
        ("Unmeasured", "lists embedding in `gathered`, but doesn't define `measure`"),
    ],
)
def test_what_is_no_recipe_is_one_line_before_anything_starts(workspace, name, says):
    """The error for a recipe of the first form refers to the guide. A method that nothing calls isn't silently accepted."""
    with pytest.raises(ConfigError, match=rf"^recipe: 'own_recipes:{name}' {says}") as e:
        check.check_job(job(recipe=f"own_recipes:{name}", evaluate=None))
    assert "\n" not in str(e.value)


def test_what_a_job_asks_of_a_recipe_that_cannot_do_it_is_refused_by_key(workspace):
    """For a recipe without `serving`, the error came after the last step."""
    least = {"recipe": "own_recipes:Least"}
    assert type(check.check_job(job(**least, evaluate=None))[1]).__name__ == "Least"
    with pytest.raises(
        ConfigError, match=r"^evaluate: own_recipes:Least doesn't support evaluation.* derive the recipe from heliostat.recipe"
    ):
        check.check_job(job(**least))
    with pytest.raises(ConfigError, match=r"^mlflow\.register: own_recipes:Least can't be served, so there is no model"):
        check.check_job(job(**least, evaluate=None, **{"mlflow.register": "mine"}))
    with pytest.raises(
        ConfigError, match=r"^checkpoint\.best\.metric: 'los' isn't a score of heliostat\.recipes:CausalLM\. Did you"
    ):
        check.check_job(job(**{"checkpoint.best": {"metric": "los", "keep": 1}}))


def test_a_recipe_that_answers_no_prompts_says_so(workspace):
    made = workspace / "model"
    made.mkdir()
    exported.write(made, job(recipe="heliostat.recipes:Autoencoder"), {})
    with pytest.raises(ConfigError, match="Autoencoder models don't answer prompts"):
        exported.generator(made, {})
    exported.write(made, job(recipe="own_recipes:Least"), {})
    with pytest.raises(ConfigError, match="'own_recipes:Least' doesn't support export"):
        exported.read(made)


# the usual answers ---------------------------------------------------------------------------------------------------


def test_the_least_recipe_is_a_whole_one():
    """Terms are its labels, or the samples. A row is shown by its columns, and the plan counts the FLOPs itself."""
    recipe = Least(job())
    batch = recipe.batch(ROWS, KEYS)
    assert recipe.terms(batch) == 3 and recipe.terms({"x": batch["x"]}) == 4
    assert recipe.describe(ROWS.slice(0, 1)) == "x [0.1, 0.2, 0.3, 0.4], label 0"
    assert recipe.flops_per_sample(recipe.build()) is None and recipe.companions() == {}
    model = build(recipe)
    assert stats_of(recipe, model).flops == 0
    kept = activations(job(**{"train.precision": "fp32"}), recipe, model, ROWS.slice(0, 1), count=True)
    assert kept.flops == 3 * 2 * (4 * 8 + 8 * 2) and kept.kept > 0


def test_scores_are_means_over_the_terms_unless_a_recipe_says_otherwise():
    class Scored(Least, Evaluates):
        def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            return {}

    recipe = Scored(job())
    assert recipe.metrics({"loss": 6.0, "right": 2.0, "terms": 4.0}) == {"loss": 1.5, "right": 0.5}
    assert recipe.scores == ("loss",) and recipe.measure({}) == {}
    with pytest.raises(ConfigError, match=r"Scored\.evaluate returns no `terms` to divide by\. Add `terms`"):
        recipe.metrics({"loss": 6.0})


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


class Answers(Recipe):
    """Fine-tunes on conversations: rows of tokens, with a mask of the tokens to learn, and the turn of each token."""

    kind = "rows"

    def build(self) -> nn.Module:
        return nn.Embedding(16, 16)

    def batch(self, content: Any, keys: np.ndarray) -> Batch:
        columns = {name: pad(content[name].to_pylist(), multiple=4) for name in ("tokens", "learned", "turn")}
        tokens, learned = columns["tokens"].values, columns["learned"].values.bool()
        return {"input_ids": tokens, "labels": torch.where(learned, tokens, IGNORED), "turn": columns["turn"].values}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        logits = model(batch["input_ids"]).flatten(0, 1)
        return Loss(nn.functional.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"))


def test_rows_may_be_tokens_with_masks_and_segments():
    """For any length: masked tokens and padding aren't terms, so micro-batches of other lengths count by their contents."""
    table = pa.table(
        {"tokens": [[1, 2, 3, 4, 5], [6, 7]], "learned": [[0, 0, 1, 1, 1], [0, 1]], "turn": [[0, 0, 1, 1, 2], [0, 1]]}
    )
    packed = unpack(pack(table), 2, tokens=False)  # as it travels to a worker
    recipe = Answers(job())
    batch = recipe.batch(packed, KEYS[:2])
    assert recipe.terms(batch) == 4 and batch["labels"].shape == (2, 8)
    assert batch["turn"][0].tolist() == [0, 0, 1, 1, 2, 0, 0, 0]
    model, objective = recipe.build(), Objective(recipe)
    micros = [recipe.batch(part(packed, slice(i, i + 1)), KEYS[i : i + 1]) for i in range(2)]
    averaged = sum(objective.part(model, micro, 2, 4).objective for micro in micros) / 2
    torch.testing.assert_close(averaged, recipe.loss(model, batch).sum / 4)
    assert recipe.describe(packed.slice(1, 1)) == "tokens [6, 7], learned [0, 1], turn [0, 1]"


# what is gathered ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 7, 16, 23])
@pytest.mark.parametrize("micro", [1, 4])
def test_what_is_gathered_comes_in_the_samples_order_once_and_of_the_same_batches(samples, micro):
    """On 1 to 5 workers, every processed batch has the same samples, and every sample counts once."""
    numbers = np.arange(100, 100 + samples)

    def play(world: int) -> tuple[np.ndarray, set[tuple[int, ...]]]:
        kept, batches = [], set()
        for rank in range(world):
            filled, counted = dealt_whole(numbers, rank, world, micro)
            mine = []
            for i in range(0, len(filled), micro):
                rows, counts = filled[i : i + micro], counted[i : i + micro]
                batches.add(tuple(rows))
                sum_of_batch = torch.full((micro, 2), float(rows.sum()))  # shows in which company a sample was
                mine.append((rows[counts], taken({"seen": sum_of_batch}, ("seen",), counts)))
            kept.append(mine)
        assert len({len(mine) for mine in kept}) == 1  # ZeRO-3 gathers together
        assert sorted(np.concatenate([n for mine in kept for n, _ in mine])) == list(numbers)
        return in_order(kept)["seen"], batches

    alone, batches = play(1)
    assert len(alone) == samples
    for world in range(2, 6):
        found, others = play(world)
        assert np.array_equal(found, alone) and others == batches


def test_what_is_gathered_may_be_bf16():
    found = taken({"seen": torch.ones(3, 2, dtype=torch.bfloat16)}, ("seen",), np.array([True, False, True]))
    assert found["seen"].dtype == np.float32 and found["seen"].shape == (2, 2)


# how weights become an export ----------------------------------------------------------------------------------------


def test_a_layout_is_a_mapping_with_prefixes_cut_off():
    class Two(Least, Exports):
        layout = {"0.": "first/model", "3.": "last"}

        def save_config(self, folder: Any) -> None: ...

        def load(self, folder: Any) -> nn.Module: ...  # type: ignore[empty-body]

    assert Two(job()).tensors({"0.weight": (8, 4), "3.weight": (2, 8), "3.bias": (2,)}) == {
        "first/model": {"weight": Weight(("0.weight",), (8, 4))},
        "last": {"weight": Weight(("3.weight",), (2, 8)), "bias": Weight(("3.bias",), (2,))},
    }


def test_shipped_recipes_are_whole():
    from heliostat.recipes.images.autoencoder import Autoencoder
    from heliostat.recipes.images.text_to_image import TextToImage

    for kind in (CausalLM, TextToImage, Autoencoder):
        assert require_class("recipe", kind.__name__, kind) is kind
