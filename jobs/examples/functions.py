"""Prepares the functions of Python's standard library, each with the package that it comes from: rows with a text and a label,
from what every machine has. A pipeline of one's own.

    heliostat data prepare jobs/examples/data/functions.yaml
"""

from __future__ import annotations

import ast
import hashlib
import io
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from heliostat.curation.prepare import InputFile, Pipeline
from heliostat.data import manifest, versions
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SPECIAL = ["<pad>"]


class Functions(Pipeline):
    packages: list[str] = Field(min_length=2)
    vocab_size: int = Field(1024, ge=257)
    chunk_rows: int = Field(128, gt=0)

    def check(self) -> None:
        for i, package in enumerate(self.packages):
            if not package.isidentifier() or not (STDLIB / package).is_dir():
                raise ConfigError(f"packages.{i}: {package!r} is no package of this Python's standard library ({STDLIB})")

    def inputs(self) -> list[InputFile]:
        found = [path for package in self.packages for path in (STDLIB / package).glob("*.py")]
        return [InputFile(str(p.relative_to(STDLIB)), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(found)]

    def write(self, output: Location, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Writes one shard, its rows by their texts' hashes: the same input gives the same bytes."""
        dropped, rows = Counter[str](), dict[str, dict[str, str]]()
        for file in inputs:
            source = (STDLIB / file.path).read_text(encoding="utf-8", errors="replace")
            for text in functions(source):
                key = hashlib.sha256(text.encode()).hexdigest()
                dropped["duplicate"] += key in rows
                rows.setdefault(key, {"id": key, "text": text, "label": file.path.split("/")[0]})
        found = [rows[key] for key in sorted(rows)]
        definition = train([row["text"] for row in found], self.vocab_size).encode()
        path = versions.store(output, "shards/", shard(found, self.chunk_rows), ".parquet")
        facts = {
            "kind": "rows",
            "documents": len(found),
            "duplicates": dropped["duplicate"],
            "classes": sorted({row["label"] for row in found}),
            "tokenizer": hashlib.sha256(definition).hexdigest(),
            "vocab_size": Tokenizer.from_str(definition.decode()).get_vocab_size(),
            "files": {"tokenizer.json": versions.store(output, "files/tokenizer-", definition, ".json")},
        }
        return manifest.read_footer(output, path, None), facts


def functions(source: str) -> list[str]:
    """Extracts the text of every function and method, without its indentation."""
    lines, found = source.split("\n"), list[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            *body, last = lines[node.lineno - 1 : node.end_lineno]
            found.append(textwrap.dedent("\n".join([*body, last.encode()[: node.end_col_offset].decode()])))
    return found


def train(texts: list[str], vocab_size: int) -> str:
    """Trains a byte-level BPE, and returns its `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def shard(rows: list[dict[str, str]], chunk_rows: int) -> bytes:
    """Writes a Parquet file whose footer holds the content's hash, so that the dataset's digest changes with any text."""
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table, row_group_size=chunk_rows)
        writer.add_key_value_metadata({"content": hashlib.sha256(repr(rows).encode()).hexdigest()})
    return sink.getvalue()
