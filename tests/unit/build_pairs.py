"""Builds a small prepared dataset of pairs, in which the query names the first word of the text, and a job that trains an
embedder on it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from heliostat.config.spec import Job
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.storage.locations import Location

from tests.unit.build_job import job

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty", "knoll", "ledge", "marsh"]
END = "<|endoftext|>"


def pairs(number: int) -> list[dict[str, str]]:
    """Returns texts of some words, with queries. About every twelfth query is the same, and every ninth text repeats the text
    before."""
    drawn = random.Random(3)
    found: list[dict[str, str]] = []
    for i in range(number):
        words = [drawn.choice(WORDS) for _ in range(drawn.randint(4, 12))]
        row = {"id": f"{i:04d}", "query": f"begins with {words[0]}", "text": " ".join(words)}
        row |= {"text": found[-1]["text"]} if i % 9 == 8 else {}
        found.append(row)
    return found


def dataset(folder: Path, number: int = 96) -> Path:
    (folder / "shards").mkdir(parents=True)
    rows = pairs(number)
    pq.write_table(pa.Table.from_pylist(rows), folder / "shards/0.parquet", row_group_size=16, write_page_checksum=True)
    definition = tokens.train([row["text"] for row in rows], 320, END)
    (folder / "tokenizer.json").write_text(definition)
    told = {"tokenizer": hashlib.sha256(definition.encode()).hexdigest(), "vocab_size": tokens.load(definition).get_vocab_size(),
            "end_of_document": tokens.end_id(tokens.load(definition), END)}  # fmt: skip
    place = Location(str(folder))
    manifest.write(place, manifest.read_footer(place, "shards/0.parquet", None), {"name": "pairs", "kind": "rows", **told})
    return folder


MODEL = {"arch": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 32, "max_tokens": 24, "temperature": 0.1}  # fmt: skip


def embedder(data: Path, **changes: Any) -> Job:
    """Builds a job with 16 pairs per step, in micro-batches of 2 on 4 virtual ranks, with dropout."""
    usual: dict[str, Any] = {"recipe": "heliostat.recipes:Embedder", "model": {**MODEL}, "data.sequence_length": None,
                             "data.sources": [{"path": str(data)}], "data.virtual_ranks": 4, "train.global_batch_size": 16,
                             "train.precision": "fp32"}  # fmt: skip
    return job(**{**usual, **changes})
