"""Tests the plan's counts of a model: parameters, activations, and work equal those of the real model."""

from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from heliostat.data import manifest
from heliostat.plan import planner
from heliostat.plan.counts import AT_STAGE_3
from heliostat.plan.model_stats import Meter, activations, build, checkpointed, stats_of, work
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location

from tests.unit import build_images
from tests.unit.build_job import job

pytestmark = pytest.mark.usefixtures("in_repository")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_parameters_are_those_of_the_model_that_is_trained(arch):
    """The count is exact, with tied weights counted once. The same modules are built with and without memory."""
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4} if arch == "gpt2" else {"hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}  # fmt: skip
    j = job(model={"arch": arch, "vocab_size": 96, **size})
    recipe = CausalLM(j)
    counted, real = stats_of(recipe, build(recipe)), recipe.build()
    assert counted.parameters == sum(p.numel() for p in real.parameters())
    assert counted.shapes == {n: tuple(p.shape) for n, p in real.named_parameters()}


@pytest.mark.parametrize(("precision", "length", "mask"), [("fp32", 64, False), ("bf16", 64, False),
                                                           ("fp32", 64, True)])  # fmt: skip
def test_activations_are_what_a_real_forward_pass_keeps(precision, length, mask):
    """Fake and real tensors give the same count. Packed documents need masks."""
    j = job(**{"train.precision": precision, "data.sequence_length": length, "data.document_mask": mask})
    recipe = CausalLM(j)
    recipe.end = 0
    counted = activations(j, recipe, build(recipe), planner.sample(j, recipe))
    model = recipe.build().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    with Meter(model) as meter:
        recipe.loss(model, recipe.batch(planner.sample(j, recipe)))
    assert counted.kept == pytest.approx(meter.result().kept, rel=0.02)
    assert counted.checkpointed == pytest.approx(meter.result().checkpointed, rel=0.02)
    assert counted.checkpointed < counted.kept


LAYERED: dict[str, dict[str, object]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 5, "n_head": 4},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2,
                    "sliding_window": 16, "num_hidden_layers": 6},
}  # fmt: skip


@pytest.mark.parametrize("arch", LAYERED)
def test_work_of_a_few_layers_stands_for_that_of_all(arch, monkeypatch):
    """Equal layers are counted once and multiplied. The result equals a count of every layer."""
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    j = job(model={"arch": arch, "vocab_size": 96, **({} if arch == "gpt2" else size), **LAYERED[arch]}, **{"workers.gpus": 1})
    recipe = CausalLM(j)
    contents = (planner.sample(j, recipe, 2), planner.sample(j, recipe, 3))
    few = work(j, recipe, build(recipe), contents)
    monkeypatch.setattr("heliostat.plan.model_stats._stacks", lambda model: [])
    assert sorted(map(astuple, few)) == sorted(map(astuple, work(j, recipe, build(recipe), contents)))


def test_work_is_what_the_model_multiplies():
    """Products have the FLOPs of Kaplan's formula, and attention has 7 products of half a square. Weights don't grow with the
    batch."""
    j = job(**{"workers.gpus": 1, "model.num_key_value_heads": 4})
    recipe = CausalLM(j)
    model = build(recipe)
    flops = recipe.flops_per_sample(model)
    found = work(j, recipe, model, (planner.sample(j, recipe, 2), planner.sample(j, recipe, 3)))
    total = {kind: sum(w.count * w.flops for w in found if w.kind == kind) for kind in ("matmul", "attention", "convolution")}
    square = 12 * 64 * 64 * 32 * 2  # forward and backward, of both layers, as flops_per_sample counts it
    assert total == {"matmul": flops - square, "attention": square * 7 / 6 / 2, "convolution": 0}
    products = [w for w in found if w.kind == "matmul"]
    assert sum(w.count * w.fixed for w in products) == 3 * 2 * (flops - square) / 6 / 64  # read twice, written once
    inside = sum(w.count * w.flops for w in products if w.replayed)
    assert inside == total["matmul"] / 3 - 2 * 64 * 32 * 96  # the forward pass, but for the head
    assert sum(w.count * w.flops for w in products if w.replayed == AT_STAGE_3) == 2 * 2 * 64 * 32 * 64  # behind what is kept
    assert all(w.dear == (w.kind in ("matmul", "attention")) for w in found if w.replayed)


@pytest.mark.parametrize("backbone", ["UNET", "PIXART", "SD3"])
def test_diffusion_models_are_counted_like_any_other(backbone, tmp_path):
    """Parameters are exact, and activations equal those of a real forward pass. The dataset determines the model's shape."""
    from heliostat.recipes.images.text_to_image import TextToImage

    data = build_images.digits(tmp_path / "data", 40)
    j = job(**build_images.job(data, backbone=getattr(build_images, backbone)))
    recipe = TextToImage(j)
    recipe.bind([manifest.read(Location(str(data)))])
    model, real = build(recipe), recipe.build()
    assert stats_of(recipe, model).parameters == sum(p.numel() for p in real.parameters())
    counted = activations(j, recipe, model, planner.sample(j, recipe))
    batch = recipe.batch(planner.sample(j, recipe), np.zeros(1, dtype=np.int64))
    inside = checkpointed(real, lambda: recipe.loss(real, batch))
    with Meter(real, inside) as meter:
        recipe.loss(real, batch)
    assert counted == replace(meter.result(), batch=sum(values.nbytes for values in batch.values())) and counted.kept > 0


def test_checkpointed_activations_grow_by_one_input_a_layer():
    """Only one layer's inner activations exist at a time, so each layer adds only its input."""
    kept = []
    for layers in (2, 3, 4):
        j = job(**{"model.num_hidden_layers": layers, "train.precision": "fp32"})
        recipe = CausalLM(j)
        kept.append(activations(j, recipe, build(recipe), planner.sample(j, recipe)))
    assert kept[1].checkpointed - kept[0].checkpointed == kept[2].checkpointed - kept[1].checkpointed == 4 * 64 * 32
    assert kept[2].kept - kept[1].kept > 4 * (4 * 64 * 32)
