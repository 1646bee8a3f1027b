"""Tests the initial weights of a job: output projections of zeros in every architecture that has them, and no other change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.recipes.text import initial
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit.build_job import job
from tests.unit.test_causal_lm import LLAMA, SHAPES

ZERO = {"init": {"zero_output_projections": True}}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {**LLAMA, "arch": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {**LLAMA, "arch": "phi"},
    "opt": {"arch": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "ffn_dim": 64, "vocab_size": 96, "max_position_embeddings": 64},
    "falcon": {"arch": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96},
}  # fmt: skip
SHAPED = SHAPES | MORE


def built(model: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    return CausalLM(job(model=model)).build().eval()


@pytest.mark.parametrize("arch", SHAPED)
def test_every_layer_begins_as_the_identity_and_all_else_as_it_would(arch):
    """Two matrices of each layer start at zero, in architectures with different names for them. The last layer's output is the
    embedding."""
    plain, zeroed = built(SHAPED[arch]), built(SHAPED[arch] | ZERO)
    before, after = dict(plain.named_parameters()), dict(zeroed.named_parameters())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == initial.output_projections(before) and len(changed) == 2 * zeroed.config.num_hidden_layers
    assert all(not after[name].any() for name in changed)
    streams: list[torch.Tensor] = []
    last = next(m for name, m in zeroed.named_modules() if name.endswith(f".{zeroed.config.num_hidden_layers - 1}"))
    last.register_forward_hook(lambda module, given, made: streams.append(made[0] if isinstance(made, tuple) else made))
    first = next(m for name, m in zeroed.named_modules() if name.endswith(".0"))
    first.register_forward_pre_hook(lambda module, given, named: streams.append(given[0] if given else named["hidden_states"]),
                                    with_kwargs=True)  # fmt: skip
    zeroed(input_ids=torch.arange(16)[None])
    assert torch.equal(streams[0], streams[1]) and streams[0].any()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["m.layers.0.attn.o_proj.weight", "m.layers.0.mlp.down_proj.weight"], 2),
        (["m.layers.0.attn.o_proj.weight", "m.layers.0.mlp.w2.weight"], 0),  # half a layer is none
        (["m.layers.0.mixer.out_proj.weight"], 0),
        (["m.layers.0.attn.o_proj.bias", "m.o_proj.weight"], 0),
        (["m.layers.0.attn.o_proj.weight", "m.layers.0.mlp.experts.down_proj", "m.layers.0.mlp.experts.gate_up_proj"], 2),
        (["l.0.attention.dense.weight", "l.0.intermediate.dense.weight", "l.0.output.dense.weight"], 2),
    ],
)
def test_which_parameters_are_output_projections(names, found):
    assert len(initial.output_projections(names)) == found


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LLAMA | {"init": {"zero_outputs": True}}, "model.init: zero_outputs: unknown key"),
        (LLAMA | {"init": {"zero_output_projections": 1}}, "model.init: zero_output_projections: expected true or false, got 1"),
        (LLAMA | {"init": None}, "model.init: expected a mapping, got None"),
        ({"arch": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4} | ZERO,
         "model.init.zero_output_projections: heliostat doesn't know the output projections of 'mamba'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(model, message):
    with pytest.raises(ConfigError) as e:
        CausalLM(job(model=model)).probe()
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_pretrained_model_begins_as_its_folder_says(tmp_path):
    built(LLAMA).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.init: a pretrained model takes its first weights .*\. Remove"):
        CausalLM(job(model={"pretrained": str(tmp_path)} | ZERO))


def test_a_model_whose_keys_are_plain_is_checked_without_transformers_and_has_no_such_key_in_its_configuration():
    recipe = CausalLM(job(model=LLAMA | ZERO))
    assert recipe.plain and "config" not in vars(recipe)
    assert not hasattr(recipe.config, "init")
