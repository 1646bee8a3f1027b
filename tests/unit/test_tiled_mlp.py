"""Tests `train.tiled_mlp`: loss and gradients equal those of whole MLPs, whose inner activations never exist whole. It is
rejected where they would differ."""

import copy
import re

import numpy as np
import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.text import tiled_mlp
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.build_job import BASE, job
from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import recipe
from tests.unit.test_spec import faults

TILED = {"train.tiled_mlp": True}
INNER, ROWS = 61, 7  # no other width of a model; tiles that the number of tokens is no multiple of
SMALL = {**BASE["model"], "intermediate_size": INNER}
MODELS = {
    "llama": SMALL,
    "qwen2": SMALL,
    "olmo2": SMALL,  # with a norm behind the MLP
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": INNER, "resid_pdrop": 0.0},
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(tiled_mlp, "tile_rows", lambda width: ROWS)


class Inside(TorchDispatchMode):
    """Records the number of tokens in the largest inner tensor of an MLP, and the number of times that its first product is
    computed."""

    rows = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == INNER and out.shape[-2] != 32:  # a weight
            self.rows = max(self.rows, out.numel() // INNER)
            self.products += func._schema.name in ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
        return out


def played(arch: str, **changes) -> tuple[float, dict[str, torch.Tensor], Inside]:
    made = recipe({"arch": arch, "vocab_size": 89, **{k: v for k, v in MODELS[arch].items() if k != "arch"}}, **changes)
    torch.manual_seed(0)
    model = made.build()
    tokens = np.random.default_rng(0).integers(0, 89, (2, 64)).astype(np.int32)
    with Inside() as seen:
        loss = made.loss(model, made.batch(tokens)).sum
        loss.backward()
        with torch.no_grad():
            made.loss(model.eval(), made.batch(tokens))
    return loss.item(), {n: p.grad for n, p in model.named_parameters()}, seen


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_whole_mlps(arch, checkpointed):
    """In training and in evaluation, no tensor inside an MLP has more tokens than a tile."""
    (loss, gradients, whole), (mine, my_gradients, seen) = (
        played(arch, **changes, **{"train.activation_checkpointing": checkpointed}) for changes in ({}, TILED)
    )
    assert mine == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == my_gradients.keys()
    assert all((my_gradients[n] - g).norm() <= 1e-5 * g.norm() for n, g in gradients.items())
    assert (whole.rows, seen.rows) == (128, ROWS)


def test_a_checkpointed_layer_plays_its_mlp_again_once_not_twice():
    """Its backward pass recomputes the layer up to the MLP's input, and the MLP's tiles recompute themselves."""
    plain, checkpointed = (played("llama", **TILED, **{"train.activation_checkpointing": on})[2] for on in (False, True))
    assert plain.products == checkpointed.products > 0


def test_gradients_of_weights_are_summed_over_tiles_in_fp32():
    """With bf16, they are almost as near to those in fp64 as those of one product, and much nearer than sums of tiles in bf16."""
    torch.manual_seed(0)
    start = torch.nn.Linear(16, 16).bfloat16()
    right, one, summed, tiled = (copy.deepcopy(start) for _ in range(4))
    hidden, upstream = torch.randn(3, 165, 16).bfloat16(), torch.randn(3, 165, 16).bfloat16()
    right.double()(hidden.double()).backward(upstream.double())
    one(hidden).backward(upstream)
    for tile, gradient in zip(hidden.reshape(-1, 16).split(11), upstream.reshape(-1, 16).split(11), strict=True):
        summed(tile).backward(gradient)
    tiled_mlp._forward(tiled, tiled.forward, 11, hidden.requires_grad_()).backward(upstream)
    whole, low, mine = (float((m.weight.grad.double() - right.weight.grad).norm()) for m in (one, summed, tiled))
    assert 0 < mine < 2 * whole and mine < low / 2 and hidden.grad.shape == hidden.shape


@pytest.mark.parametrize(("model", "why"), [
    ({"arch": "mixtral", "num_local_experts": 4}, "the model's layers have experts instead of MLPs"),
    ({"arch": "gpt2", "n_embd": 32, "n_head": 4}, r"the model's MLPs draw random numbers, which differ in tiles \(set the"),
    ({"arch": "bloom", "hidden_size": 32, "n_head": 4, "hidden_dropout": 0.0}, "the model's MLPs take other inputs"),
    ({"arch": "opt", "hidden_size": 32, "num_attention_heads": 4}, "some layers have no MLP module"),
])  # fmt: skip
def test_a_model_without_such_mlps_is_refused_in_one_line(model, why):
    with pytest.raises(ConfigError, match=rf"train\.tiled_mlp: not supported for '{model['arch']}': {why}") as e:
        recipe(model, **TILED).probe()
    assert "\n" not in str(e.value)


def test_an_mlp_that_mixes_tokens_is_found(monkeypatch):
    """For any code of an architecture, because the trial computes it."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    plainly = LlamaMLP.forward
    recipe({"arch": "llama"}, **TILED).probe()
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plainly(self, x) + x.mean(1, keepdim=True))
    with pytest.raises(ConfigError, match=r"the model's MLPs don't compute each token independently\. Set this key to false"):
        recipe({"arch": "llama"}, **TILED).probe()


def test_what_cannot_hold_it_is_refused_by_name():
    (line,) = faults(**TILED, **{"train.compile": True})
    assert line == "train.tiled_mlp: true isn't supported with train.compile. Set one of them to false"
    with pytest.raises(ConfigError, match=re.escape("doesn't support tiled MLPs. Set this key to false")):
        require_abilities(job(**TILED, evaluate=None), Around(torch.nn.Module))
