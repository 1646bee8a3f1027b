"""Makes matching pairs of texts, on Ray: docstrings with their functions (Python), titles with their sections (Markdown,
HTML), and pairs from records (`.jsonl`, `.parquet`). Run: `heliostat data prepare pipelines/pairs.yaml`.

Guarantees: the dataset is a pure function of the configuration, and of the relative paths and bytes of the input files. The hash
of a pair's text decides the pair's shard, and its position in the shard. Of equal pairs, the dataset has only one. All pairs with
the same text are held out together.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from heliostat.curation.pairs import extracting
from heliostat.curation.pairs.making import PairMaking
from heliostat.curation.pairs.reading import KIND, QUERY, Least, PairSource
from heliostat.curation.prepare import InputFile
from heliostat.curation.sampled import SampledParts
from heliostat.curation.staged import StagedPipeline
from heliostat.curation.text import documents, sources, tokens
from heliostat.curation.text.pipeline import TokenizerConfig
from heliostat.errors import ConfigError
from heliostat.schema import Strict
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow


class PairColumns(Strict):
    query: str = "query"
    """Column with the query."""
    text: str = "text"
    """Column with the text that the query is about."""


class PairPipeline(StagedPipeline):
    """Defines the keys of a pipeline's YAML for pairs of texts; `input` is a file, folder, glob, s3:// prefix, or
    `python:stdlib`."""

    later = frozenset({"record_documents"})
    moved = {"query_column": "query", "text_column": "text"}

    input: str = Field(min_length=1)
    """Input: a file, a folder, a glob (`data/**/*.md`), an `s3://` prefix, a dataset of the Hugging Face Hub
    (`hf://datasets/ORG/NAME`, docs/guides/hub.md), or `python:stdlib`. heliostat extracts pairs from `.py`, `.md` and `.html`,
    and reads them from `.jsonl` and `.parquet`."""
    exclude: list[str] = []
    """Globs of files to skip. heliostat matches the globs against paths relative to the input's folder."""
    columns: PairColumns = PairColumns()
    """Names of the columns of `.jsonl` and `.parquet`."""
    min_query_words: int = Field(2, ge=1)
    """Minimum words of a query. Pairs with shorter queries are dropped (`short_query`)."""
    min_text_words: int = Field(8, ge=1)
    """Minimum words of a text. Pairs with shorter texts are dropped (`short_text`)."""
    normalise: Literal["none", "NFC", "NFKC"] = "NFC"
    """Unicode normal form to which heliostat converts queries and texts. The normal form affects which pairs are equal."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer for a model that trains from scratch: trained on the texts, or used unchanged. Unset: no tokenizer, because a
    pretrained model has its own tokenizer."""
    chunk_pairs: int = Field(1024, gt=0)
    """Approximate pairs per row group."""
    shard_bytes: int = Field(128_000_000, gt=0)
    """Approximate bytes of text per shard. This size limits the memory of the task that writes the shard."""

    @cached_property
    def given_tokenizer(self) -> str | None:
        return self.tokenizer.definition() if self.tokenizer else None

    def check(self) -> None:
        if self.columns.query == self.columns.text:
            raise ConfigError(
                f"columns.query: {self.columns.query!r} is also the value of columns.text. "
                "Set columns.query and columns.text to different columns"
            )
        if self.tokenizer and self.given_tokenizer is not None:
            tokens.end_id(tokens.load(self.given_tokenizer), self.tokenizer.end_of_document)
        for stage in self.stages:
            if stage.of_images:
                raise ConfigError(f"stages: {stage.named()} reads images, but text pairs have no images. Remove this stage")
        self.check_stages()
        self.check_columns((QUERY, KIND), "")
        for pattern in self.exclude:
            sources.glob_regex(pattern, "exclude")
        self.check_places(self.input, None if self.input == sources.STDLIB else sources.root(self.input).path)

    def inputs(self) -> list[InputFile]:
        return sources.without(sources.listing(self.input, ("extract", "pdf")), self.exclude)

    def identity(self) -> dict[str, Any]:
        config = super().identity() | {"extracting": extracting.VERSION}
        del config["columns"]
        config |= {"query_column": self.columns.query, "text_column": self.columns.text}  # the keys from when they were separate
        if self.given_tokenizer is not None:  # the tokenizer's content counts, not its location
            config["tokenizer"]["path"] = hashlib.sha256(self.given_tokenizer.encode()).hexdigest()
        config["stages"] = [stage.identity() for stage in self.stages]
        return config

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> PairMaking:
        rules = documents.TextRules(text_column=self.columns.text, normalise=self.normalise, columns=(self.columns.query,))
        return PairMaking(
            flow=flow, source=PairSource(self.input, rules, self.columns.query, Least(self.min_query_words, self.min_text_words)),
            output=output, stages=self.stages, memory_limit=self.memory_limit,
            tokenizer=self.tokenizer.model_dump() if self.tokenizer else {},
            given_tokenizer=self.given_tokenizer, shard_bytes=self.shard_bytes,
            chunk_pairs=self.chunk_pairs, every=self.every(sample),
        )  # fmt: skip
