"""Makes the two small datasets of the golden curves: the same samples in the same order, with any versions of libraries."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from heliostat.data import manifest
from heliostat.storage.locations import Location

from tests.unit import build_images

VOCABULARY = 96
END = 0


def build(folder: Path) -> None:
    """Makes `folder`/causal_lm and `folder`/text_to_image."""
    tokens(folder / "causal_lm")
    build_images.digits(folder / "text_to_image", 120)


def tokens(folder: Path, documents: int = 120) -> Path:
    """Returns prepared documents in which a token mostly follows from the one before, so that there is something to learn."""
    made = []
    for number in range(documents):
        raw = np.random.Philox(key=[7, number]).random_raw(96)  # which NumPy promises on every machine and version
        document = [int(raw[0] % (VOCABULARY - 1)) + 1]
        for noise in raw[1 : 24 + int(raw[0] % 64)].tolist():
            known = noise % 8 != 0
            document.append((document[-1] * 5 + 3 if known else noise // 8) % (VOCABULARY - 1) + 1)
        made.append([*document, END])
    (folder / "shards").mkdir(parents=True)
    table = pa.table({"tokens": pa.array(made, pa.list_(pa.uint16()))})
    pq.write_table(table, folder / "shards/0.parquet", row_group_size=20, write_page_checksum=True)
    words = {str(number): number for number in range(VOCABULARY)}
    vocabulary = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"}}
    definition = json.dumps(vocabulary).encode()
    (folder / "tokenizer.json").write_bytes(definition)
    meta = {"name": "tokens", "kind": "tokens", "tokenizer": hashlib.sha256(definition).hexdigest(), "vocab_size": VOCABULARY,
            "end_of_document": END}  # fmt: skip
    place = Location(str(folder))
    manifest.write(place, manifest.read_footer(place, "shards/0.parquet", "tokens"), meta)
    return folder
