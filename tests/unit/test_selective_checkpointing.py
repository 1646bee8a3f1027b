"""Tests `train.activation_checkpointing: selective`: the same bits as without it, and expensive operations are computed once."""

import numpy as np
import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.text import selective, tiled_mlp
from heliostat.recipes.text.selective import Giving, Keeping, is_dear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.unit.build_job import BASE, job
from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import recipe
from tests.unit.test_spec import faults

WHICH, ON = "train.activation_checkpointing", {"train.activation_checkpointing": "selective"}
SMALL = {k: v for k, v in BASE["model"].items() if k != "arch"} | {"num_hidden_layers": 3, "vocab_size": 89}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MODELS = {
    "llama": SMALL | {"attention_dropout": 0.1},
    "gpt2": GPT2,  # with dropout
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "olmo2": SMALL,
    "gemma2": SMALL | {"head_dim": 8},
    "qwen2": SMALL,  # with biases
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 89},  # adds in place
    "mixtral": SMALL | {"num_local_experts": 4},
}


class Seen(TorchDispatchMode):
    """Counts expensive operations."""

    def __init__(self) -> None:
        super().__init__()
        self.dear = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.dear += is_dear(func, args, kwargs)
        return out


def played(arch: str, **changes) -> tuple[torch.Tensor, int, int]:
    """Returns the loss, the whole gradient, and the number of expensive operations in the forward pass and in both passes."""
    made = recipe({"arch": arch, **MODELS[arch]}, **changes)
    torch.manual_seed(0)
    model = made.build()
    tokens = np.random.default_rng(0).integers(0, 89, (2, 64)).astype(np.int32)
    torch.manual_seed(1)  # the same dropout
    with Seen() as seen:
        loss = made.loss(model, made.batch(tokens)).sum
        forward = seen.dear
        loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())]), forward, seen.dear


ALIKE = [("llama", {"data.document_mask": True}), ("llama", {"train.attention": "eager"}), ("qwen2", {"train.tiled_loss": True})]


@pytest.mark.parametrize(("arch", "changes"), [*((arch, {}) for arch in MODELS), *ALIKE], ids=str)
def test_losses_and_gradients_are_the_same_to_the_bit_and_nothing_dear_is_computed_again(arch, changes):
    plain, forward, both = played(arch, **changes)
    mine, my_forward, my_both = played(arch, **changes, **ON)
    assert torch.equal(mine, plain)
    assert (my_forward, my_both) == (forward, both) and both < played(arch, **changes, **{WHICH: True})[2]


def test_tiles_of_an_mlp_are_not_kept(monkeypatch):
    """They would be all inner activations. The operations before the MLP are recomputed as elsewhere."""
    monkeypatch.setattr(tiled_mlp, "tile_rows", lambda width: 7)
    kept: list[Keeping] = []
    make = selective.contexts
    monkeypatch.setattr(selective, "contexts", lambda: (kept.append(made := make()[0]), (made, Giving(made.kept)))[1])
    tiled = {"train.tiled_mlp": True}
    for arch in ("llama", "olmo2"):  # and with a norm behind it, for which it is played again
        mine, plain = played(arch, **tiled, **ON)[0], played(arch, **tiled)[0]
        assert torch.equal(mine, plain)
    assert len(kept) == 6


def in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Adds in place, like the bias of DeepSpeed's linear layers at stage 3."""
    out = torch.sin(x) @ w
    with torch.no_grad():
        out += 1
    return torch.cos(out) @ w


def test_an_output_that_is_written_into_later_is_kept_as_it_was():
    """torch's own contexts reject it."""
    x, w = (torch.randn(4, 4, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (0, 1))
    right = torch.autograd.grad(in_place(x, w).sum(), (x, w))
    mine = checkpoint(in_place, x, w, use_reentrant=False, context_fn=selective.contexts)
    assert all(map(torch.equal, torch.autograd.grad(mine.sum(), (x, w)), right))


def test_an_output_that_is_written_into_behind_the_layer_is_an_error_and_no_other_gradient():
    def layer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product = x @ x
        return product, torch.cos(product)

    product, out = checkpoint(layer, torch.randn(4, 4, requires_grad=True), use_reentrant=False, context_fn=selective.contexts)
    with torch.no_grad():
        product.mul_(2)
    with pytest.raises(RuntimeError, match=r"the saved output of aten.mm.default was changed in place after the layer"):
        out.sum().backward()


def test_a_second_backward_pass_is_an_error():
    x = torch.randn(4, 4, requires_grad=True)
    out = checkpoint(in_place, x, x, use_reentrant=False, context_fn=selective.contexts).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"recomputed layer calls aten.mm.default, but the saved output is of None"):
        out.backward()


def test_attention_that_drops_out_is_played_again():
    """Otherwise the random numbers that it draws on a GPU would be missing from those that the rest of the layer draws."""
    q = torch.empty(1, 2, 8, 4, device="meta")
    for fused in (torch.ops.aten._scaled_dot_product_flash_attention.default, torch.ops.aten._flash_attention_forward.default):
        given = (q, q, q) if "scaled" in str(fused) else (q, q, q, None, None, 8, 8)
        assert is_dear(fused, (*given, 0.0, True)) and not is_dear(fused, (*given, 0.1, True))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert is_dear(efficient, (q, q, q, None, True)) and not is_dear(efficient, (q, q, q, None, True, 0.1))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    assert not is_dear(backward) and not is_dear(torch.ops.aten.bmm.default) and is_dear(torch.ops.aten.addmm.default)


def test_what_it_was_not_tried_with_is_refused_in_one_line():
    for key, value, named in (
        ("train.compile", True, "train.compile"),
        ("train.activation_offload", True, "train.activation_offload"),
        ("train.parallel", {"tensor": 2}, "train.parallel.tensor"),
    ):
        said = faults(**ON, **{key: value, "workers.count": 2, "train.zero.stage": 1})
        assert f"{WHICH}: selective isn't supported with {named}. Remove one of them" in said
    with pytest.raises(ConfigError, match=r"checkpoints all layers or none\. Set this key to true or false"):
        require_abilities(job(**ON, evaluate=None), Around(torch.nn.Module))
    with pytest.raises(ConfigError, match=rf"{WHICH}: transformers doesn't checkpoint the layers of '.*' one by one"):
        recipe({"arch": "xlnet", "d_model": 32, "n_head": 4, "n_layer": 2}, **ON).probe()


@pytest.mark.parametrize("arch", ["llama", "mixtral", "falcon"])
def test_it_is_tried_before_a_run_begins(arch, monkeypatch):
    one = recipe({"arch": arch, **MODELS[arch]}, **ON)
    one.probe()
    monkeypatch.setattr(
        Giving, "__torch_dispatch__", lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {})) * 1.5
    )
    with pytest.raises(
        ConfigError, match=rf"{WHICH}: '{arch}' doesn't support selective checkpointing: .*\. Set this key to true or false"
    ):
        recipe({"arch": arch, **MODELS[arch]}, **ON).probe()
