"""Builds small frozen text encoders of each kind for tests, in folders as diffusers names them, with their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from heliostat.recipes.images import diffusers_folder
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

SMALL: dict[str, Any] = {"vocab_size": 320, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


def encoder(kind: str, folder: Path, dataset: Path, length: int = 8, width: int = 16) -> Path:
    """Saves a `clip`, a `clip+` (with a projection of another width), a `t5`, or a `gemma`. `dataset`: for the tokenizer."""
    torch.manual_seed(sum(f"{kind} {folder.name}".encode()))
    model: Any
    if kind.startswith("clip"):
        config = CLIPTextConfig(**SMALL, hidden_size=width, projection_dim=width - 4, max_position_embeddings=max(length, 8),
                                bos_token_id=0, eos_token_id=0, pad_token_id=0)  # fmt: skip
        model = CLIPTextModelWithProjection(config) if kind == "clip+" else CLIPTextModel(config)
    elif kind == "t5":
        model = T5EncoderModel(T5Config(vocab_size=320, d_model=width, d_ff=32, num_layers=2, num_heads=2, d_kv=width // 2))
    else:
        keys = {**SMALL, "hidden_size": width, "num_key_value_heads": 1, "head_dim": 8}
        model = Gemma2Model(Gemma2Config(**keys, pad_token_id=0, eos_token_id=0, bos_token_id=0))
    model.save_pretrained(folder)
    tokenizer = diffusers_folder.tokenizer((dataset / "tokenizer.json").read_bytes(), 0, length)
    tokenizer.save_pretrained(folder.parent / folder.name.replace("text_encoder", "tokenizer"))
    return folder


def texts(kinds: list[str], place: Path, dataset: Path, lengths: list[int] | None = None, widths: list[int] | None = None) -> Any:
    """Saves text encoders, and returns the job's key `model.text` with them."""
    out = []
    for number, kind in enumerate(kinds, start=1):
        length, width = (values[number - 1] if values else usual for values, usual in ((lengths, 8), (widths, 16)))
        name = "text_encoder" if number == 1 else f"text_encoder_{number}"
        out.append({"pretrained": str(encoder(kind, place / name, dataset, length, width)), "length": length})
    return out
