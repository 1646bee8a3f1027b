"""Builds small prepared datasets of conversations: packs for SFT, and preferences for DPO. In each conversation, the user writes
some words, and the assistant answers with the first of these words."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from heliostat.config.spec import Job
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.data.conversations import FACT, PACKS, PREFERENCES, TEMPLATE, ConversationFacts
from heliostat.storage.locations import Location
from tokenizers import Tokenizer

from tests.unit.build_job import job

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "ledge", "marsh"]
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "Answer with the first word."
MODEL = {"arch": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64}  # fmt: skip
Messages = list[dict[str, str]]


def conversations(number: int, seed: int = 3) -> list[Messages]:
    """Returns conversations of one to three questions. Every third conversation begins with a system prompt."""
    drawn = random.Random(seed)
    made: list[Messages] = []
    for i in range(number):
        messages = [{"role": "system", "content": SYSTEM}] if i % 3 == 0 else []
        for _ in range(drawn.randint(1, 3)):
            words = [drawn.choice(WORDS) for _ in range(drawn.randint(2, 5))]
            messages += [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[0]}]
        made.append(messages)
    return made


def tokenizer() -> Tokenizer:
    definition = tokens.train([f"{' '.join(WORDS)} {SYSTEM} system user assistant"] * 2, 400, END, [START, STOP])
    return Tokenizer.from_str(definition)


class Rendered(NamedTuple):
    """Contains a conversation as tokens. `trained`: for each token, whether the model learns to predict this token."""

    tokens: list[int]
    trained: list[bool]


def render(raw: Tokenizer, messages: Messages, end_of_turn: bool = True, turns: str = "all") -> Rendered:
    """Renders messages like CHATML, and marks the assistant's contents and ends of turns as trained."""
    rendered = Rendered([], [])

    def add(text: str, trained: bool) -> None:
        ids = raw.encode(text, add_special_tokens=False).ids
        rendered.tokens.extend(ids)
        rendered.trained.extend([trained] * len(ids))

    for number, message in enumerate(messages):
        learned = message["role"] == "assistant" and (turns == "all" or number == len(messages) - 1)
        add(f"{START}{message['role']}\n", False)
        add(message["content"], learned)
        add(STOP, learned and end_of_turn)
        add("\n", False)
    return rendered


def packed(sizes: list[int], length: int) -> list[list[int]]:
    """Packs conversations of these sizes in order, without splitting any. Returns the conversations' numbers of each pack."""
    packs: list[list[int]] = []
    for number, size in enumerate(sizes):
        if not packs or sum(sizes[i] for i in packs[-1]) + size > length:
            packs.append([])
        packs[-1].append(number)
    return packs


def packs(
    folder: Path,
    number: int = 96,
    length: int = 96,
    pack: bool = True,
    end_of_turn: bool = True,
    turns: str = "all",
    chats: list[Messages] | None = None,
    raw: Tokenizer | None = None,
    template: str = CHATML,
) -> Path:
    """Writes a dataset of packs. `pack`: False writes one conversation per row. `chats`: other conversations than usual."""
    raw = raw or tokenizer()
    chats = conversations(number) if chats is None else chats
    rendered = [render(raw, chat, end_of_turn, turns) for chat in chats]
    sizes = [len(one.tokens) for one in rendered]
    groups = packed(sizes, length) if pack else [[i] for i in range(len(rendered))]
    rows = [{"ids": [f"chat-{i:04d}" for i in group], "lengths": [sizes[i] for i in group],
             "tokens": [t for i in group for t in rendered[i].tokens],
             "trained": [t for i in group for t in rendered[i].trained]} for group in groups]  # fmt: skip
    stop = raw.token_to_id(STOP)
    ends = [(t, m) for one in rendered for t, m in zip(one.tokens, one.trained, strict=True)]
    learned = sum(m for one in rendered for m in one.trained)
    answers = sum(message["role"] == "assistant" for chat in chats for message in chat)
    counts = {"conversations": len(rendered), "tokens": sum(sizes), "trained": learned,
              "turns": answers if turns == "all" else len(rendered), "trained_ends": sum(t == stop and m for t, m in ends),
              "untrained": sum(not any(one.trained) for one in rendered), "cut": 0, "split": 0, "retokenized": 0, "ended": 0,
              "padding": len(rows) * length - sum(sizes)}  # fmt: skip
    return write(folder, rows, PACKS, raw, {"form": "packs", "sequence_length": length, "turns": turns,
                                            "end_of_turn": end_of_turn, "counts": counts}, template)  # fmt: skip


def preferences(folder: Path, number: int = 48, length: int = 96, raw: Tokenizer | None = None, seed: int = 5) -> Path:
    """Writes a dataset of preferences: the better answer is the first word, the worse answer is another word."""
    raw, drawn, rows = raw or tokenizer(), random.Random(seed), []
    stop = raw.token_to_id(STOP)

    def encoded(text: str) -> list[int]:
        return raw.encode(text, add_special_tokens=False).ids

    for i in range(number):
        words = drawn.sample(WORDS, drawn.randint(2, 5))
        prompt = encoded(f"{START}user\n{' '.join(words)}{STOP}\n{START}assistant\n")
        rows.append({"id": f"pair-{i:04d}", "prompt": prompt, "chosen": [*encoded(words[0]), stop],
                     "rejected": [*encoded(" ".join(words[1:])), stop]})  # fmt: skip
    learned = sum(len(row[name]) for row in rows for name in ("chosen", "rejected"))
    counts = {"conversations": number, "tokens": learned + sum(len(row["prompt"]) for row in rows), "trained": learned,
              "turns": 2 * number, "trained_ends": 2 * number, "untrained": 0, "cut": 0, "split": 0,
              "retokenized": 0, "ended": 0, "padding": 0}  # fmt: skip
    return write(folder, rows, PREFERENCES, raw, {"form": "preferences", "sequence_length": length, "turns": "last",
                                                  "end_of_turn": True, "counts": counts})  # fmt: skip


def write(
    folder: Path, rows: list[dict[str, Any]], columns: pa.Schema, raw: Tokenizer, facts: Mapping[str, Any], template: str = CHATML
) -> Path:
    """Writes the rows, the tokenizer, the template, and the manifest."""
    (folder / "shards").mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=columns)
    pq.write_table(table, folder / "shards/0.parquet", row_group_size=8, write_page_checksum=True)
    definition = raw.to_str()
    (folder / "tokenizer.json").write_text(definition)
    (folder / TEMPLATE).write_text(template)
    whole: ConversationFacts = {"template": xxhash.xxh3_128_hexdigest(template.encode()), "end": raw.token_to_id(STOP),
                    "reference": None, **facts}  # type: ignore[typeddict-item]  # fmt: skip
    known = {"tokenizer": hashlib.sha256(definition.encode()).hexdigest(), "vocab_size": raw.get_vocab_size(),
             "end_of_document": raw.token_to_id(END), FACT: whole}  # fmt: skip
    place = Location(str(folder))
    manifest.write(place, manifest.read_footer(place, "shards/0.parquet", None), {"name": folder.name, "kind": "rows", **known})
    return folder


def sft(data: Path, **changes: Any) -> Job:
    """Builds a job that trains a small model on packs, with 8 packs per step in micro-batches of 2 on 4 virtual ranks."""
    usual: dict[str, Any] = {"recipe": "heliostat.recipes:SFT", "model": {**MODEL}, "data.sequence_length": None,
                             "data.sources": [{"path": str(data)}], "data.document_mask": True, "data.virtual_ranks": 4,
                             "train.precision": "fp32"}  # fmt: skip
    return job(**{**usual, **changes})
