"""Tests overrides of a pretrained configuration: a key that fits the weights is used, exported, and recorded; any other is
rejected by name."""

import json

import pytest
import torch
import transformers
from heliostat.errors import ConfigError
from heliostat.tracking.card import parents

from tests.unit.test_causal_lm import recipe

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
         "vocab_size": 96, "max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_theta=5e5)).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def told(folder: str, length: int = 64, **keys) -> str:
    with pytest.raises(ConfigError) as e:
        recipe({"pretrained": folder, **keys}, length).probe()
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (YARN, {**YARN, "original_max_position_embeddings": 64}),
        ({"rope_type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4},
            {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64},
        ),
    ],
)  # fmt: skip
def test_rotary_positions_are_extended_by_the_factor(folder, scaling, expected):
    """The base stays the folder's, and so do the weights. Samples may be as long as the factor times the folder's maximum, and
    positions are rotated differently."""
    one = recipe({"pretrained": folder, "rope_scaling": scaling}, 256)
    one.probe()
    assert one.config.rope_parameters == {**expected, "rope_theta": 5e5} and one.config.max_position_embeddings == 256
    made, plain = one.build(), recipe({"pretrained": folder}).build()
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), plain.parameters(), strict=True))
    by_transformers = transformers.AutoModelForCausalLM.from_pretrained(
        folder, rope_parameters={**expected, "rope_theta": 5e5}, max_position_embeddings=256
    )
    tokens = torch.arange(96)[None]
    ours = made.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours, by_transformers.eval()(input_ids=tokens).logits)
    assert (ours - plain.eval()(input_ids=tokens).logits).abs().max() > 1e-4
    assert told(folder, 257, rope_scaling=scaling).startswith("data.sequence_length: 257 is above the model's max_position")


def test_other_keys_of_the_architecture_are_taken(folder):
    one = recipe({"pretrained": folder, "attention_dropout": 0.1, "max_position_embeddings": 128}, 128)
    one.probe()
    assert (one.config.attention_dropout, one.config.max_position_embeddings) == (0.1, 128)
    assert one.config.rope_parameters["rope_theta"] == 5e5
    assert one.build().model.layers[0].self_attn.attention_dropout == 0.1


def test_the_exported_configuration_has_them(folder, tmp_path):
    """transformers loads the trained model from the export's config.json."""
    one = recipe({"pretrained": folder, "rope_scaling": YARN, "attention_dropout": 0.1}, 256)
    config = type(one.config).from_dict(one.config.to_dict())
    config.save_pretrained(tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_parameters"] == {**YARN, "rope_theta": 5e5, "original_max_position_embeddings": 64}
    assert (raw["max_position_embeddings"], raw["attention_dropout"]) == (256, 0.1)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert again.rope_parameters == one.config.rope_parameters


def test_the_lineage_says_what_was_changed(folder):
    one = recipe({"pretrained": folder, "rope_scaling": YARN}, 256)
    (parent,) = parents(one.job)
    assert (parent["folder"], parent["changed"]) == (folder, {"rope_scaling": YARN})
    assert parents(recipe({"pretrained": folder}).job)[0]["changed"] == {}


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"rope_scalin": YARN}, "rope_scalin: unknown key for the pretrained 'llama'. Did you mean 'rope_scaling'?"),
        ({"rope_theta": 100.0}, "rope_theta: unknown key for the pretrained 'llama'. Remove this key"),
        (
            {"atention_dropout": 0.1},
            "atention_dropout: unknown key for the pretrained 'llama'. Did you mean 'attention_dropout'?",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_scaling.factor: required key missing. Write model.rope_scaling.factor: NUMBER",
        ),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "rope_scaling.factor: 0.5 is too small. Use 1 or more"),
        ({"rope_scaling": {**YARN, "rope_type": "yarm"}}, "rope_scaling.rope_type: 'yarm' isn't a choice. Did you mean 'yarn'?"),
        ({"rope_scaling": {**YARN, "beta_fas": 1}}, "rope_scaling.beta_fas: unknown key. Did you mean 'beta_fast'?"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 1}},
            "rope_scaling: beta_fast: not supported for rope_type 'linear'. Remove this key",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {}},
            "rope_scaling: model.rope_parameters is set too. Remove one of these two keys",
        ),
        (
            {"hidden_size": 64},
            "hidden_size: 64 doesn't fit the pretrained weights: 'lm_head.weight' has size 96 x 32, and with this key 96 x 64. "
            "Remove this key",
        ),
        (
            {"attention_dropout": 0.1, "num_hidden_layers": 1},
            "num_hidden_layers: 1 doesn't fit the pretrained weights: 'model.layers.1.input_layernorm.weight' has size 32, and "
            "with this key nothing. Remove this key",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder, keys, error):
    assert told(folder, **keys) == f"model.{error}"


def test_a_model_without_rotary_positions_has_none_to_extend(tmp_path):
    transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96).save_pretrained(tmp_path)
    assert told(str(tmp_path), rope_scaling=YARN) == "model.rope_scaling: 'gpt2' has no rotary embeddings. Remove this key"


def test_positions_of_several_kinds_are_given_whole(tmp_path):
    """Gemma 3 rotates its windows differently from its full attention."""
    transformers.Gemma3TextConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}).save_pretrained(tmp_path)
    assert "has several kinds of rotary embeddings. Set all of model.rope_parameters" in told(str(tmp_path), rope_scaling=YARN)
