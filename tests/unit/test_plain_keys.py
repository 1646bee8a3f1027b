"""Tests that models that are checked without transformers are also valid for transformers; all others are left to
transformers."""

import random
from typing import Any, get_args

import pytest
from heliostat.errors import ConfigError
from heliostat.recipes.text import model_config, plain_keys
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.plain_keys import Plain

from tests.unit.build_job import BASE, job
from tests.unit.test_samples import make_text

ARCHES = get_args(Plain.model_fields["arch"].annotation)
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
OTHERS: dict[str, list[Any]] = {
    "vocab_size": [1, 96, 128_256],
    "max_position_embeddings": [1, 64, 131_072],
    "hidden_act": ["silu", "gelu", "relu", "relu2"],
    "rms_norm_eps": [1e-12, 1e-6, 0.5],
    "initializer_range": [0.0, 0.02, 1.0],
    "attention_dropout": [0.0, 0.5],
    "tie_word_embeddings": [True, False],
}


@pytest.mark.parametrize("arch", ARCHES)
def test_what_is_taken_for_right_is_right_for_transformers(arch):
    """Random sizes and all values of the other keys, including every key of the short list."""
    assert {"arch", "head_dim", *SIZES, *OTHERS} == set(Plain.model_fields)
    draw = random.Random(arch)
    for _ in range(150):
        groups, each = draw.randint(1, 6), draw.randint(1, 4)
        keys = {"arch": arch, "num_key_value_heads": groups, "num_attention_heads": groups * each,
                "hidden_size": groups * each * 2 * draw.randint(1, 20), "num_hidden_layers": draw.randint(1, 5),
                "intermediate_size": draw.randint(1, 300)}  # fmt: skip
        keys |= {name: draw.choice(values) for name, values in OTHERS.items() if draw.random() < 0.5}
        if arch not in plain_keys.WITHOUT_HEAD_DIM and draw.random() < 0.5:  # heads need not make up the width
            keys |= {"head_dim": 2 * draw.randint(1, 20), "hidden_size": groups * each * draw.randint(1, 40)}
        assert plain_keys.read(keys)
        config = model_config.from_keys(keys)
        assert all(getattr(config, name) == value for name, value in keys.items() if name != "arch")


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in SIZES for value in (0, -1, 2.0, "4", True, None)),
        *({name: None} for name in OTHERS),
        {"num_attention_heads": 5}, {"hidden_size": 44}, {"num_key_value_heads": 3}, {"hidden_act": "sliu"},
        {"rms_norm_eps": "1e-6"}, {"initializer_range": 2.0}, {"tie_word_embeddings": 1}, {"hiden_size": 48}, {"arch": "gpt2"},
        {"arch": "lama"}, {"head_dim": 11}, {"head_dim": 0}, {"head_dim": None}, {"arch": "qwen2", "head_dim": 12},
        {"rope_parameters": {}}, {1: 2}, {"vocab_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_may_be_wrong_is_left_to_transformers(changes):
    assert plain_keys.read({"arch": "llama", **SIZES}) and plain_keys.read({"arch": "llama", **SIZES, **changes}) is None


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_not_given_is_transformers_default(name):
    """The default may not fit the given sizes."""
    assert plain_keys.read({"arch": "mistral", **{k: v for k, v in SIZES.items() if k != name}}) is None


def bound(path: Any, **changes: Any) -> CausalLM:
    """Returns a recipe bound to a dataset of 256 tokens."""
    made = CausalLM(job(**changes))
    made.bind([make_text(path)])
    return made


def test_the_configuration_is_the_same_whether_it_is_made_before_the_datasets_or_behind(tmp_path, monkeypatch):
    """It contains the sample length and the vocabulary of the datasets."""
    model = {k: v for k, v in BASE["model"].items() if k not in ("vocab_size", "max_position_embeddings")} | {"arch": "llama"}
    changes = {"model": model, "data.sequence_length": 4096}
    late = bound(tmp_path / "late", **changes)
    assert late.plain and "config" not in vars(late)
    monkeypatch.setattr(plain_keys, "read", lambda model: None)
    early = bound(tmp_path / "early", **changes)
    assert "config" in vars(early) and early.config.to_dict() == late.config.to_dict()
    assert late.config.max_position_embeddings == 4096 and late.config.eos_token_id == late.end
    assert late.config.vocab_size % 64 == 0 and not late.config.use_cache


@pytest.mark.parametrize("plain", [True, False])
def test_what_does_not_fit_the_job_is_found_either_way(tmp_path, monkeypatch, plain):
    if not plain:
        monkeypatch.setattr(plain_keys, "read", lambda model: None)
    model = {"arch": "llama", **SIZES, "vocab_size": 96, "max_position_embeddings": 32}
    with pytest.raises(
        ConfigError, match=r"data\.sequence_length: 33 is above the model's max_position_embeddings\. Use at most 32"
    ):
        CausalLM(job(**{"model": model, "data.sequence_length": 33}))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 1 is below the tokenizer's"):
        bound(tmp_path / "d", **{"model": {**model, "vocab_size": 1}, "data.sequence_length": 16})
