"""`train.activation_checkpointing: selective`: the same bits as without, dear operations computed once, in less memory."""

import weakref

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
    """Counts dear operations."""

    def __init__(self) -> None:
        super().__init__()
        self.dear = 0
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.dear += is_dear(func, args, kwargs)
        return out


def played(arch: str, **changes) -> tuple[torch.Tensor, int, int]:
    """The loss and the whole gradient, and the dear operations of the forward pass and of both."""
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


@pytest.mark.parametrize("changes", [{}, {"data.document_mask": True}, {"train.attention": "eager"}, {"train.tiled_loss": True}], ids=str)
@pytest.mark.parametrize("arch", MODELS)
def test_losses_and_gradients_are_the_same_to_the_bit_and_nothing_dear_is_computed_again(arch, changes):
    plain, forward, both = played(arch, **changes)
    mine, my_forward, my_both = played(arch, **changes, **ON)
    whole = played(arch, **changes, **{WHICH: True})
    assert torch.equal(mine, plain)
    assert (my_forward, my_both) == (forward, both) and whole[2] > both
