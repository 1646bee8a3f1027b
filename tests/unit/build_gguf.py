"""Writes GGUF files of tiny Llama models, as llama.cpp's converter does, with the library `gguf`."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.unit.test_samples import END, TEXTS, tokens

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=96, max_position_embeddings=128, initializer_range=0.2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write(
    file: Path, source: LlamaForCausalLM, types: gguf.GGMLQuantizationType, arch: str = "llama", pre: str = "smollm"
) -> Path:
    """Writes the model with matrices of one type, the tokenizer of the tests' texts, and a chat template."""
    config, out = source.config, gguf.GGUFWriter(file, arch)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_license("mit")
    _add_tokenizer(out, pre)
    for name, values in source.state_dict().items():
        stored = values.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp pairs a head's dimensions in another order
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            stored = stored.reshape(heads, 2, -1, stored.shape[1]).swapaxes(1, 2).reshape(stored.shape)
        kind = types if stored.ndim > 1 else gguf.GGMLQuantizationType.F32
        out.add_tensor(_named(name), gguf.quants.quantize(np.ascontiguousarray(stored), kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def _named(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    number, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[inner]}.weight"


def _add_tokenizer(out: gguf.GGUFWriter, pre: str) -> None:
    definition = json.loads(tokens.train(TEXTS, 300, END))
    names = {**definition["model"]["vocab"], **{t["content"]: t["id"] for t in definition["added_tokens"]}}
    ordered = sorted(names, key=names.__getitem__)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(ordered)
    out.add_token_types([gguf.TokenType.CONTROL if name == END else gguf.TokenType.NORMAL for name in ordered])
    out.add_token_merges([" ".join(pair) for pair in definition["model"]["merges"]])
    out.add_bos_token_id(names[END])
    out.add_eos_token_id(names[END])
    out.add_chat_template(TEMPLATE)
