"""Tests that FLOPs equal those that torch counts while the model runs: true attention shapes, and the experts of each token."""

import pytest
import torch
from heliostat.recipes.text import flops
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.test_causal_lm import recipe

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80,
         "vocab_size": 96}  # fmt: skip
ROUTED = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 8}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 12,
          "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
          "topk_group": 1, "moe_intermediate_size": 40}  # fmt: skip
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96}
FAMILIES = {
    "llama": SMALL,
    "mistral": {**SMALL, "head_dim": 20},
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 32},  # as Qwen3-0.6B: heads that are together wider than the model
    "gemma2": {**SMALL, "head_dim": 32},
    "phi3": {**SMALL, "pad_token_id": 0},
    "gpt2": GPT2,
    "gpt_neox": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "falcon": {**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "intermediate_size")}},
    "mixtral": {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {**ROUTED, "decoder_sparse_step": 1},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 56},
    "olmoe": {**SMALL, "num_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {**SMALL, "head_dim": 20, "num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {**SMALL, "num_key_value_heads": 4, **LATENT},
}


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_flops_are_what_torch_counts(arch):
    """Forward and backward passes of a real model on real tokens, each sent to its own experts. torch sums the products."""
    for length in (24, 96):
        made = recipe({"arch": arch, **FAMILIES[arch]}, length)
        made.config._attn_implementation = made.config._experts_implementation = "eager"  # torch's counter knows no other
        torch.manual_seed(0)
        model = made.build()
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.randint(0, 96, (1, length))).logits.sum().backward()
        assert made.flops_per_sample(model) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_published_models_have_the_active_parameters_that_their_papers_say():
    """Mixtral 8x7B: 12.9 of 46.7 billion (arXiv 2401.04088). Qwen3-0.6B: 16 heads of 128 on a width of 1,024."""
    mixtral = {"arch": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    made = recipe(mixtral, 4096)
    with torch.device("meta"):
        model = made.build()
    embeddings = 32000 * 4096
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(46.7e9, rel=0.001)
    assert flops.multiplied(model, made.config) + embeddings == pytest.approx(12.9e9, rel=0.003)
    qwen = {"arch": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "intermediate_size": 3072, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}  # fmt: skip
    made = recipe(qwen, 4096)
    with torch.device("meta"):
        model = made.build()
    assert flops.attended(model, made.config) == 28 * 16 * 2 * 128


def test_flops_grow_with_length_as_attention_does():
    """Twice the length takes twice the FLOPs of matrices, and four times those of attention."""
    llama = {"arch": "llama", **SMALL}
    one, two, four = (recipe(llama, n).flops_per_sample(recipe(llama, n).build()) for n in (32, 64, 128))
    assert four - 2 * two == 2 * (two - 2 * one) * 2
