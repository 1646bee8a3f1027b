"""Tests `train.activation_checkpointing` of some layers, and `train.activation_offload`: the same bits as without them, in less
memory."""

import re

import numpy as np
import pytest
import torch
from heliostat.data.device_streams import HostTensors
from heliostat.errors import ConfigError
from heliostat.plan.model_stats import Meter
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.text import checkpointing

from tests.unit.build_job import BASE, job
from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import recipe
from tests.unit.test_spec import faults

WHICH, OFFLOAD = "train.activation_checkpointing", "train.activation_offload"
LAYERS = 4
MODEL = {**BASE["model"], "arch": "llama", "num_hidden_layers": LAYERS, "attention_dropout": 0.1}


def played(**changes) -> tuple[torch.Tensor, int]:
    """Returns the loss, the whole gradient, and the bytes that the forward pass keeps on the device."""
    made = recipe(MODEL, **changes)
    torch.manual_seed(0)
    model = made.build()
    tokens = np.random.default_rng(0).integers(0, 89, (2, 64)).astype(np.int32)
    torch.manual_seed(1)  # the same dropout
    with Meter(model) as meter:
        loss = made.loss(model, made.batch(tokens)).sum
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())]), meter.total


def test_losses_and_gradients_are_the_same_to_the_bit_and_take_less():
    """For no layer, one, three, and all layers: more layers keep fewer bytes, and inputs on the host aren't kept on the
    device."""
    whole, kept = played()
    for which in (1, 3, True):
        mine, less = played(**{WHICH: which})
        assert torch.equal(mine, whole) and less < kept
        kept = less
    mine, less = played(**{WHICH: True, OFFLOAD: True})
    hidden = 4 * 2 * 64 * 32
    assert torch.equal(mine, whole) and less == kept - LAYERS * hidden


def test_only_a_layers_input_goes_to_the_host(monkeypatch):
    """The host gets a copy of the input. The backward pass computes with the bytes that come back from it."""
    seen = []
    monkeypatch.setattr(checkpointing, "HostTensors", lambda: Spied(seen))
    mine, _ = played(**{WHICH: 3, OFFLOAD: True})
    assert [t.shape for t in seen if t.requires_grad] == [(2, 64, 32)] * 3
    monkeypatch.undo()
    assert torch.equal(mine, played()[0])


class Spied(HostTensors):
    def __init__(self, seen: list[torch.Tensor]) -> None:
        super().__init__()
        packed = self.pack_hook
        self.pack_hook = lambda tensor: (seen.append(tensor), packed(tensor))[1]


def test_more_layers_than_there_are_is_refused_with_the_number():
    recipe(MODEL, **{WHICH: LAYERS}).probe()
    with pytest.raises(
        ConfigError,
        match=re.escape(f"{WHICH}: 5 must be below the number of layers of 'llama', which is 4. Set this key to true"),
    ):
        recipe(MODEL, **{WHICH: LAYERS + 1}).probe()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_layers_of_known_architectures_hand_over_their_input(arch):
    model = {"arch": arch, "num_hidden_layers": 2} | ({"n_embd": 32, "n_head": 4} if arch == "gpt2" else {})
    recipe(model, **{WHICH: True, OFFLOAD: True}).probe()


def test_layers_that_take_their_input_by_name_are_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    call = LlamaDecoderLayer.__call__
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda self, hidden, **more: call(self, hidden_states=hidden, **more))
    with pytest.raises(
        ConfigError, match=r"doesn't support activation offload: the layers take their input.*\. Set this key to false"
    ):
        recipe(MODEL, **{WHICH: True, OFFLOAD: True}).probe()


def test_what_cannot_hold_it_is_refused_by_name():
    why = "because only inputs of checkpointed layers are offloaded. Set both keys"
    assert faults(**{OFFLOAD: True}) == [f"{OFFLOAD}: needs {WHICH}, {why}"]
    assert faults(**{OFFLOAD: True, WHICH: True, "train.compile": True}) == [
        f"{OFFLOAD}: true isn't supported with train.compile. Set one of them to false"
    ]
    for wrong in (0, "some", 1.5):
        assert faults(**{WHICH: wrong}) == [
            f"{WHICH}: {wrong!r} isn't a choice. Use true, false, selective, or a number of layers (1 or more)"
        ]
    for changes, said in (
        ({WHICH: 2}, "checkpoints all layers or none"),
        ({WHICH: True, OFFLOAD: True}, "doesn't support activation offload"),
    ):
        with pytest.raises(ConfigError, match=said):
            require_abilities(job(**changes, evaluate=None), Around(torch.nn.Module))
