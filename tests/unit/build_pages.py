"""Builds a prepared dataset of real text, from the reference that Python ships, split into documents as the pipeline stores
them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.storage.locations import Location

END = "<|endoftext|>"
WORDS = 220  # of a document


@cache
def texts() -> tuple[str, ...]:
    """Returns paragraphs of all topics, each once, joined to documents of some length."""
    found, held = list[str](), list[str]()
    for part in dict.fromkeys(part for _, topic in sorted(topics.items()) for part in topic.split("\n\n")):
        held.append(part)
        if sum(len(one.split()) for one in held) >= WORDS:
            found.append("\n\n".join(held))
            held = []
    return tuple(found)


def make(folder: Path, documents: tuple[str, ...] = (), chunk_tokens: int = 8000) -> manifest.Manifest:
    """Writes two shards with documents in the order of their places, so that a held-out fraction consists of complete
    documents."""
    documents = documents or texts()
    definition = tokens.train(documents, 600, END)
    tokenizer = tokens.load(definition)
    end, place, rows = tokens.end_id(tokenizer, END), Location(str(folder)), []
    place.join("tokenizer.json").write(definition.encode())
    for number in range(2):
        mine = [(manifest.place(hashlib.sha256(t.encode()).hexdigest()), t) for t in documents[number::2]]
        mine.sort(reverse=True)
        path, places = f"shards/{number}.parquet", np.array([p for p, _ in mine], np.int64)
        encoded = tokens.encode(tokenizer, [t for _, t in mine], end)
        place.join(path).write(tokens.shard([f"{number}-{i}" for i in range(len(mine))], encoded, chunk_tokens, places))
        rows += manifest.read_footer(place, path, "tokens")
    facts = {"tokenizer": hashlib.sha256(definition.encode()).hexdigest(), "vocab_size": tokenizer.get_vocab_size()}
    return manifest.write(place, rows, {"kind": "tokens", **facts, "end_of_document": end})
