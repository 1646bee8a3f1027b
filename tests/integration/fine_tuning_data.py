"""Builds small weights, and datasets for fine-tuning in which a step has all conversations: packed, one per row, and preferences
with and without a reference."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from heliostat.data.conversations import REFERENCE
from heliostat.recipes.folder_digests import weights_digest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.unit import build_conversations

NUMBER, LENGTH, SEED = 16, 96, 7
IGNORED = -100
Row = dict[str, Any]


def build(folder: Path) -> None:
    """Writes `base`, `packed`, `single` (the same conversations), `pairs`, and `referred` (the same pairs)."""
    raw = build_conversations.tokenizer()
    chats = next(chats for chats in map(partial(build_conversations.conversations, NUMBER), range(100)) if fits(raw, chats))
    for name, pack in (("packed", True), ("single", False)):
        build_conversations.packs(folder / name, length=LENGTH, pack=pack, chats=chats, raw=raw)
    build_conversations.preferences(folder / "pairs", 8, LENGTH, raw=raw)
    base(folder / "base", raw)
    refer(folder, raw)


def base(folder: Path, raw: Tokenizer) -> None:
    """Writes a model with random weights, and the tokenizer of the datasets."""
    config = LlamaConfig(vocab_size=raw.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH)  # fmt: skip
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(raw.to_str())


def fits(raw: Tokenizer, chats: list[build_conversations.Messages]) -> bool:
    """Checks whether the conversations make eight rows, so that every number of workers and micro-batches divides them."""
    sizes = [len(build_conversations.render(raw, chat).tokens) for chat in chats]
    return len(build_conversations.packed(sizes, LENGTH)) == 8


def refer(folder: Path, raw: Tokenizer) -> None:
    """Writes preferences with log-probabilities of the weights, moved by a number per row, so that no margin is 0."""
    model, found = AutoModelForCausalLM.from_pretrained(folder / "base"), []
    for number, row in enumerate(rows(folder, "pairs")):
        with torch.no_grad():
            values = {f"reference_{name}": float(answer(model, row, name)[0]) for name in ("chosen", "rejected")}
        found.append({**row, **values, "reference_chosen": values["reference_chosen"] + 0.3 * number - 1})
    facts = {"form": "preferences", "sequence_length": LENGTH, "turns": "last", "end_of_turn": True}
    names = ("tokens", "trained", "untrained", "cut", "split", "retokenized", "ended", "padding")
    counts = {"conversations": 8, "turns": 16, "trained_ends": 16, **dict.fromkeys(names, 0)}
    reference = {"digest": weights_digest(folder / "base"), "precision": "fp32"}
    build_conversations.write(folder / "referred", found, REFERENCE, raw, {**facts, "counts": counts, "reference": reference})


def rows(folder: Path, name: str) -> list[Row]:
    return pq.read_table(folder / name / "shards/0.parquet").to_pylist()


def answer(model: Any, row: Row, name: str) -> tuple[torch.Tensor, int]:
    """Returns the log-probability of an answer, with the loss of transformers, and its number of tokens."""
    tokens = torch.tensor([[*row["prompt"], *row[name]]])
    labels = tokens.clone()
    labels[:, : len(row["prompt"])] = IGNORED
    return -model(input_ids=tokens, labels=labels, num_items_in_batch=1).loss, len(row[name])
