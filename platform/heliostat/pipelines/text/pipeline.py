"""Turns text into token shards with Ray Data jobs. Run: `heliostat prepare pipelines/quickstart.yaml`.

Guarantees: the dataset is a pure function of the input's relative paths and bytes and of the configuration. Every
document goes to the shard that its text's SHA-256 names, so duplicates meet in one group and are dropped there (the
smallest id stays); within a shard documents lie by hash, which is a pseudo-random order that no scheduling can change.
Texts never pass through the driver. A read task holds its files in memory and a shard task its shard: `shard_bytes`
bounds the second, so keep input files well below a worker's memory. What is left out is listed, with the reason, in
`quarantine.parquet`. No file takes more memory or disk than `max_file_bytes` and `max_document_bytes` allow, however it is
packed; of Parquet files, the sizes of row groups are taken from their footers, unchecked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import ray
from pyarrow.fs import FileType
from pydantic import Field, model_validator
from ray.data import Dataset
from ray.data.context import ShuffleStrategy

from heliostat.config.schema import Strict
from heliostat.data import versions
from heliostat.data.manifest import FILES
from heliostat.errors import ConfigError
from heliostat.pipelines.prepare import InputFile, Pipeline, place
from heliostat.pipelines.text import documents, sources, tokens
from heliostat.pipelines.text import tasks as text_tasks
from heliostat.storage import Location

log = logging.getLogger(__name__)

FOOTERS_PER_TASK = 64


class TokenizerConfig(Strict):
    """Chooses the tokenizer: `vocab_size` trains a byte-level BPE, `path` takes a tokenizer.json or a folder that holds one."""

    vocab_size: int | None = Field(None, ge=257)
    """Trains a byte-level BPE with so many tokens: 256 bytes, the end of a document, and what merges make."""
    train_bytes: int = Field(100_000_000, gt=0)
    """So much text, of the documents with the lowest hashes, trains it."""
    path: str | None = None
    """Takes an existing one: a `tokenizer.json`, or a folder that holds one."""
    end_of_document: str = Field("<|endoftext|>", min_length=1)
    """The token behind each document. An existing tokenizer must have it."""

    @model_validator(mode="after")
    def _one(self) -> TokenizerConfig:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give either vocab_size (to train one) or path (to take one)")
        return self


class TextPipeline(Pipeline):
    """Defines the keys of a text pipeline's YAML; `input` is a file, folder, glob, s3:// prefix, or `python:stdlib`."""

    later = frozenset({"max_document_bytes", "max_file_bytes"})

    input: str = Field(min_length=1)
    """What is read: a file, a folder, a glob (`data/**/*.md`), an `s3://` prefix, or `python:stdlib`. Kinds of files:
    docs/reference/text-pipeline.md#what-is-read"""
    tokenizer: TokenizerConfig
    """Trained from the text, or taken as it is."""
    text_column: str = "text"
    """The column of `.jsonl` and `.parquet` that holds the text."""
    normalise: Literal["none", "NFC", "NFKC"] = "NFC"
    """Unicode's normal form that every text is brought to before anything else. It decides which documents are equal."""
    min_chars: int = Field(1, ge=1)
    """Documents of fewer characters are left out (`too_short`)."""
    max_chars: int | None = Field(None, ge=1)
    """Documents of more characters are left out (`too_long`). Unset: no limit."""
    max_document_bytes: int = Field(1 << 26, ge=1)
    """Documents of more bytes, unpacked, are left out (`too_large`)."""
    max_file_bytes: int = Field(1 << 33, ge=1)
    """Of an input file, as it lies there and unpacked: what comes behind the limit is left out (`too_large`)."""
    chunk_tokens: int = Field(1_000_000, gt=0)
    """Tokens of a chunk, about, and never twice as many: a document that is longer is cut. See docs/prepare.md#chunks"""
    shard_bytes: int = Field(128_000_000, gt=0)
    """Bytes of text in a shard, about; it bounds the memory of the task that writes it."""

    @property
    def rules(self) -> documents.Rules:
        return documents.Rules(self.text_column, self.normalise, self.min_chars, self.max_chars, self.max_document_bytes,
                               self.max_file_bytes)  # fmt: skip

    @cached_property
    def given(self) -> str | None:
        """Reads the definition of the existing tokenizer, None if none is named; ConfigError if it is missing or not UTF-8."""
        path = self.tokenizer.path
        if path is None:
            return None
        location = place(path).join("tokenizer.json")
        if not location.exists():
            location = place(path)
            if location.fs.get_file_info(location.path).type != FileType.File:
                raise ConfigError(f"tokenizer.path: {path!r}: no such file, and no tokenizer.json in such a folder")
        try:
            return location.read().decode()
        except UnicodeDecodeError as e:
            raise ConfigError(f"tokenizer.path: {location} is not UTF-8 text") from e

    def check(self) -> None:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(f"max_chars: {self.max_chars} is below min_chars {self.min_chars}; nothing would be kept")
        if self.given is not None:
            tokens.end_id(tokens.load(self.given), self.tokenizer.end_of_document)
        if self.input == sources.STDLIB:
            return
        here, there = f"{sources.root(self.input).path}/", f"{place(self.output).path}/"
        if here.startswith(there) or there.startswith(here):
            raise ConfigError(f"output: {self.output!r} and the input {self.input!r} lie in one another; move the output away")

    def inputs(self) -> list[InputFile]:
        return sources.listing(self.input)

    def identity(self) -> dict[str, Any]:
        config = super().identity()
        if self.given is not None:  # what it says, not where it lies
            config["tokenizer"]["path"] = hashlib.sha256(self.given.encode()).hexdigest()
        return config

    def write(self, output: Location, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        with ray_data():
            return self._write(output, inputs)

    def _write(self, output: Location, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        tasks = sources.pack(inputs, max(1 << 20, min(64 << 20, sum(f.bytes for f in inputs) // 8)))
        rows = ray.data.from_items([{"paths": t} for t in tasks], override_num_blocks=len(tasks)).map_batches(
            partial(text_tasks.extract, input=self.input, rules=self.rules), batch_size=1, batch_format="pyarrow"
        )
        # read once: a second reading could differ. The object store spills to disk what does not fit in memory
        rows = rows.materialize()
        sizes = sum(
            (np.frombuffer(row["sizes"], np.int64) for row in _map(rows, text_tasks.prefix_sizes).iter_rows()),
            np.zeros(text_tasks.PREFIXES, np.int64),
        )
        definition = self.given if self.given is not None else self._train(rows, sizes)
        tokenizer = tokens.load(definition)
        end = tokens.end_id(tokenizer, self.tokenizer.end_of_document)
        beside = {"tokenizer.json": versions.store(output, f"{FILES}/tokenizer-", definition.encode(), ".json")}

        shards = max(1, round(int(sizes.sum()) / self.shard_bytes))
        write_group = partial(
            text_tasks.write_group,
            output=output.uri,
            definition=ray.put(definition),
            end=end,
            chunk_tokens=self.chunk_tokens,
        )
        done = _map(rows, text_tasks.assign, shards=shards).groupby("shard").map_groups(write_group, batch_format="pyarrow")
        totals = Totals(tokenizer.get_vocab_size())
        for row in done.iter_rows():
            totals.add(row)
        totals.log()
        if not totals.paths:
            return [], {"dropped": dict(totals.dropped), "listed": totals.listed}
        footers = ray.data.from_items(
            [{"path": p, "contents": c} for p, c in sorted(totals.paths.items())],
            override_num_blocks=-(-len(totals.paths) // FOOTERS_PER_TASK),
        ).flat_map(partial(text_tasks.footer, output=output.uri))
        return list(footers.iter_rows()), {
            "kind": "tokens",
            "files": beside,
            "listed": totals.listed,
            "tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "vocab_size": tokenizer.get_vocab_size(),
            "end_of_document": end,
            "documents": totals.documents,
            "dropped": {reason: totals.dropped[reason] for reason in sorted(totals.dropped)},
            "duplicates": totals.duplicates,
            **({"cuts": totals.cut} if totals.cut else {}),
            "bytes": totals.bytes,
            "unigram_entropy": tokens.entropy(totals.counts),
        }

    def _train(self, rows: Dataset, sizes: np.ndarray) -> str:
        """Trains a tokenizer on the documents of the lowest hashes, up to train_bytes: the same sample from any blocks."""
        limit = int(np.searchsorted(np.cumsum(sizes), self.tokenizer.train_bytes))
        sample = _map(rows, text_tasks.lowest, limit=limit).to_arrow_refs()
        assert self.tokenizer.vocab_size is not None
        train_on = text_tasks.train_on.options(label_selector=self.labels or None)
        return ray.get(train_on.remote(self.tokenizer.model_dump(), *sample))


class Totals:
    """Sums the shards' reports."""

    def __init__(self, vocab_size: int) -> None:
        self.documents = self.duplicates = self.bytes = self.cut = 0
        self.listed: str | None = None  # where the list of what was left out is
        self.paths: dict[str, str] = {}  # of the shards, with their chunks' digests as JSON
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, row: dict[str, Any]) -> None:
        if row["path"]:
            self.paths[row["path"]] = row["contents"]
            self.documents += row["documents"]
            self.duplicates += row["duplicates"]
            self.bytes += row["bytes"]
            self.cut += row["cut"]
            self.counts += np.frombuffer(row["counts"], np.int64)
        else:
            self.dropped.update(json.loads(row["dropped"]))
            self.examples.update(json.loads(row["examples"]))
            self.listed = row["listed"]

    def log(self) -> None:
        if self.cut:
            log.info("documents longer than a chunk may be (chunk_tokens) are cut at %d places; no token is lost", self.cut)
        for reason, count in sorted(self.dropped.items()):
            log.warning("dropped %d: %s, such as %s", count, documents.REASONS[reason],
                        sources.examples(self.examples[reason]))  # fmt: skip


@contextmanager
def ray_data() -> Iterator[None]:
    """Sets Ray Data up for these jobs and restores its settings after them: no progress bars, and groups by sorting.

    The hash shuffle starts an actor per partition, which costs more than the whole quickstart (9 s against 3.5 s).
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.shuffle_strategy
    context.enable_progress_bars, context.shuffle_strategy = False, ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    try:
        yield
    finally:
        context.enable_progress_bars, context.shuffle_strategy = before


def _map(rows: Dataset, fn: Any, **kwargs: Any) -> Dataset:
    return rows.map_batches(fn, batch_size=None, batch_format="pyarrow", fn_kwargs=kwargs)
