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
from heliostat.recipes import exported
from heliostat.recipes.batches import in_order, pad, taken
from heliostat.recipes.conformance import require_class
from heliostat.recipes.protocol import IGNORED, Batch, Evaluates, Exports, Loss, Recipe, Weight
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.training.worker.evaluation import dealt_whole
from heliostat.training.worker.objective import Objective
from heliostat.validation import check
from torch import nn

from tests.unit.build_job import job
from tests.unit.build_least_recipe import KEYS, ROWS, Least


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
