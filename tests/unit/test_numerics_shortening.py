"""Tests that shortened rows of conversations are valid rows of the same conversations."""

from __future__ import annotations

import random

import pyarrow as pa
from heliostat.data.conversations import PACKS, PREFERENCES
from heliostat.numerics import shortening

DRAWS = 300


def test_a_shortened_pack_is_a_range_of_the_pack_and_keeps_something_to_train() -> None:
    for seed in range(DRAWS):
        drawn = random.Random(seed)
        sizes, longest = [drawn.randint(1, 30) for _ in range(drawn.randint(1, 6))], drawn.randint(2, 60)
        size = sum(sizes)
        trained = [drawn.random() < drawn.choice([0.0, 0.05, 0.5]) for _ in range(size)]
        row = {"ids": [str(i) for i in range(len(sizes))], "lengths": sizes, "tokens": [*range(size)], "trained": trained}
        short = shortening.pack(row, longest)
        kept = slice(short["tokens"][0], short["tokens"][-1] + 1)
        assert short["tokens"] == row["tokens"][kept] and short["trained"] == trained[kept]
        assert len(short["tokens"]) == sum(short["lengths"]) == min(size, longest)
        ends = {sum(sizes[: i + 1]) for i in range(len(sizes))}
        inner = {kept.start + sum(short["lengths"][: i + 1]) for i in range(len(short["lengths"]) - 1)}
        assert len(short["ids"]) == len(short["lengths"]) and ends >= inner, "conversations end where they ended"
        assert any(short["trained"]) == any(trained)


def test_a_shortened_preference_prefers_the_same_answer() -> None:
    for seed in range(DRAWS):
        drawn = random.Random(seed)
        row = {name: "".join(drawn.choices("ab", k=drawn.randint(1, 30))) for name in ("prompt", "chosen", "rejected")}
        if row["chosen"] == row["rejected"]:
            continue
        short = shortening.preference({name: [*text] for name, text in row.items()}, longest := drawn.randint(4, 60))
        parts = {name: "".join(tokens) for name, tokens in short.items()}
        assert all(parts.values()) and parts["chosen"] != parts["rejected"]
        assert len(parts["prompt"]) + max(len(parts["chosen"]), len(parts["rejected"])) <= longest
        for name in ("chosen", "rejected"):
            assert parts["prompt"] + parts[name] in row["prompt"] + row[name]


def test_tables_keep_their_columns() -> None:
    pack = {"ids": ["a"], "lengths": [8], "tokens": [*range(8)], "trained": [True] * 8}
    pair = {"id": "a", "prompt": [1] * 9, "chosen": [2] * 9, "rejected": [3] * 9}
    for row, schema in ((pack, PACKS), (pair, PREFERENCES)):
        table = pa.Table.from_pylist([row], schema=schema)
        short = shortening.shortened(table, 4)
        assert isinstance(short, pa.Table) and short.schema == schema and short != table
        assert shortening.shortened(table, 100) == table
