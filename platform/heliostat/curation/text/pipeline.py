"""Turns text into token shards, on Ray. Run: `heliostat prepare pipelines/quickstart.yaml`.

Guarantees: the dataset is a pure function of the input's relative paths and bytes and of the configuration. Every
document goes to the shard that its text's SHA-256 names, so duplicates meet in one task and are dropped there (the
smallest id stays); within a shard documents lie by hash, which is a pseudo-random order that no scheduling can change.
Neither texts nor ids pass through the driver. Files are read in ranges or streamed, and a task holds a share of `memory_limit`,
a shard's task its shard. What is left out is listed, with the reason, in `quarantine.parquet`. No file takes more memory or disk
than `max_file_bytes` and `max_document_bytes` allow, however it is packed; of Parquet files, the sizes of row groups are taken
from their footers, unchecked.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal

from pyarrow.fs import FileType
from pydantic import Field, model_validator

from heliostat import extras
from heliostat.curation import readers, reasons, synthetic
from heliostat.curation.prepare import InputFile, place
from heliostat.curation.readers import warc
from heliostat.curation.sampled import SampledParts
from heliostat.curation.staged import StagedPipeline
from heliostat.curation.text import documents, infilling, repositories, sampling, sources, tokens
from heliostat.curation.text.gathering import Together
from heliostat.curation.text.infilling import FillInTheMiddle
from heliostat.curation.text.making import SHARD_SHARE, TextMaking
from heliostat.curation.text.tasks import TextSource
from heliostat.data.infilling import OWN, encode
from heliostat.errors import ConfigError
from heliostat.schema import Strict
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow

log = logging.getLogger(__name__)

LEAST = 257  # tokens of a tokenizer that is trained: the bytes, and the end of a document


class TokenizerConfig(Strict):
    """Chooses the tokenizer: `vocab_size` trains a byte-level BPE, `path` takes a tokenizer.json or a folder that holds one."""

    vocab_size: int | None = Field(None, ge=LEAST)
    """Trains a byte-level BPE with so many tokens: 256 bytes, the end of a document, and what merges make."""
    train_bytes: int = Field(100_000_000, gt=0)
    """So much text, of the documents with the lowest hashes, trains it."""
    path: str | None = None
    """Takes an existing one: a `tokenizer.json`, or a folder that holds one."""
    end_of_document: str = Field("<|endoftext|>", min_length=1)
    """The token after each document. An existing tokenizer must have it."""

    @model_validator(mode="after")
    def _one(self) -> TokenizerConfig:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give either vocab_size (to train one) or path (to take one)")
        return self

    def definition(self) -> str | None:
        """Reads the definition of the existing tokenizer, None if none is named; ConfigError if it is missing or not UTF-8."""
        if self.path is None:
            return None
        location = place(self.path, "tokenizer.path").join("tokenizer.json")
        if not location.exists():
            location = place(self.path, "tokenizer.path")
            if location.fs.get_file_info(location.path).type != FileType.File:
                raise ConfigError(f"tokenizer.path: {self.path!r}: no such file, and no tokenizer.json in such a folder")
        try:
            return location.read().decode()
        except UnicodeDecodeError as e:
            raise ConfigError(f"tokenizer.path: {location} is not UTF-8 text") from e


class TextColumns(Strict):
    text: str = "text"
    """Holds the text."""
    others: list[str] = []
    """Others (`url`, `date`, `source`) that go with each document through the stages."""


class TextPipeline(StagedPipeline):
    """Defines the keys of a text pipeline's YAML; `input` is a file, folder, glob, s3:// prefix, or `python:stdlib`."""

    later = frozenset({"max_document_bytes", "max_file_bytes", "columns", "stages", "exclude", "repositories",
                       "fill_in_the_middle", "together"})  # fmt: skip
    beside = frozenset({"work", "keep_work", "memory_limit"})
    moved = {"text_column": "text"}

    input: str = Field(min_length=1)
    """What is read: a file, a folder, a glob (`data/**/*.md`), an `s3://` prefix, or `python:stdlib`. Kinds of files:
    docs/reference/text-pipeline.md#what-is-read"""
    exclude: list[str] = []
    """Globs of files that are not read (`encodings/**`), by their paths below the input's folder, as globs of `input` are."""
    repositories: bool = False
    """Reads the archives (`.tar`, also packed, and `.zip`) and git clones of the input as repositories of code, and nothing else.
    See docs/prepare.md#code"""
    tokenizer: TokenizerConfig
    """Trained from the text, or taken as it is."""
    columns: TextColumns = TextColumns()
    """Which columns hold what, in files of records (`.jsonl`, `.parquet`, `.csv`)."""
    normalise: Literal["none", "NFC", "NFKC"] = "NFC"
    """Unicode's normal form that every text is brought to before anything else. It decides which documents are equal."""
    min_chars: int = Field(1, ge=1)
    """Documents of fewer characters are left out (`too_short`)."""
    max_chars: int | None = Field(None, ge=1)
    """Documents of more characters are left out (`too_long`). Unset: no limit."""
    max_document_bytes: int = Field(1 << 26, ge=1)
    """Documents of more bytes, unpacked, are left out (`too_large`)."""
    max_file_bytes: int = Field(1 << 40, ge=1)
    """Of an input file, as it lies there and unpacked: what comes after the limit is left out (`too_large`)."""
    chunk_tokens: int = Field(1_000_000, gt=0)
    """Tokens of a chunk, about, and never twice as many: a document that is longer is cut. See docs/prepare.md#chunks"""
    shard_bytes: int = Field(128_000_000, gt=0)
    """Bytes of text in a shard, about; it bounds the memory of the task that writes it."""
    fill_in_the_middle: FillInTheMiddle | None = None
    """Rearranges documents, so that a model learns to write what stands between a prefix and a suffix.
    See docs/prepare.md#filling-in-the-middle"""
    together: Together | None = None
    """Documents that follow each other in the dataset, so that a model sees them in one sequence: those with the same value in a
    column, as `repository`. They are held out together. See docs/prepare.md#documents-that-belong-together"""

    @property
    def rules(self) -> documents.TextRules:
        return documents.TextRules(self.max_document_bytes, self.max_file_bytes, self.columns.text, tuple(self.columns.others),
                               self.normalise, self.min_chars, self.max_chars)  # fmt: skip

    @cached_property
    def given_tokenizer(self) -> str | None:
        return self.tokenizer.definition()

    def check(self) -> None:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(f"max_chars: {self.max_chars} is below min_chars {self.min_chars}; nothing would be kept")
        if self.given_tokenizer is not None:
            tokens.end_id(tokens.load(self.given_tokenizer), self.tokenizer.end_of_document)
        if self.fill_in_the_middle:
            self._check_markers()
        for stage in self.stages:
            if stage.of_images:
                raise ConfigError(f"stages: {stage.named()} looks at images, which a text pipeline has none of; remove it")
            stage.check()
        self.check_columns(self._known, "columns.others")
        if self.repositories:
            extras.require("curation", "identify", what="repositories: licenses are recognized by their texts, which")
            if self.input == sources.STDLIB:
                raise ConfigError(f"repositories: {sources.STDLIB} is no repository; remove one of the two")
        if self.together:
            self._check_together(self.together)
        for pattern in self.exclude:
            sources.glob_regex(pattern, "exclude")
        if self.shard_bytes * SHARD_SHARE > self.memory_limit:
            log.warning("shard_bytes: a shard of %d bytes takes about %d of memory, more than memory_limit (%d)",
                        self.shard_bytes, self.shard_bytes * SHARD_SHARE, self.memory_limit)  # fmt: skip
        self.check_places(self.input, None if self.input == sources.STDLIB else sources.root(self.input).path)

    @property
    def _known(self) -> set[str]:
        """Returns the columns that documents come with, or may: those of crawls are known where a file is read."""
        crawled = warc.COLUMNS if readers.numbered(self.input) in ("byte", None) else ()
        return {*self.columns.others, *(repositories.COLUMNS if self.repositories else crawled)}

    def _check_together(self, together: Together) -> None:
        """Raises ConfigError if documents do not have the columns; those of repositories come with them."""
        known = {*self.columns.others, *(repositories.COLUMNS if self.repositories else ())}
        for key, name in together.model_dump(exclude_none=True).items():
            if name not in known:
                known_names = f"; there are {', '.join(sorted(known))}" if known else ""
                raise ConfigError(
                    f"together.{key}: {name!r} is none of the documents' columns{known_names}; name it under `columns.others` too"
                )

    def _check_markers(self) -> None:
        """Raises ConfigError if the tokenizer has no markers, or no room for them."""
        if self.given_tokenizer is not None:
            tokenizer = tokens.load(infilling.marking(self.given_tokenizer, infilling.names(tokens.load(self.given_tokenizer))))
            encode(tokenizer, [])
        elif self.tokenizer.vocab_size is not None and self.tokenizer.vocab_size < LEAST + len(OWN):
            raise ConfigError(
                f"tokenizer.vocab_size: {self.tokenizer.vocab_size} has no room for the {len(OWN)} tokens of fill_in_the_middle; "
                f"give {LEAST + len(OWN)} or more"
            )

    def inputs(self) -> list[InputFile]:
        if self.repositories:
            return sources.without(repositories.listing(self.input), self.exclude)
        stages = {"extract", *(stage.named() for stage in self.stages)} if self.stages else ()  # any stage may read pages
        return sources.without(sources.listing(self.input, stages), self.exclude)

    def written_by(self, inputs: list[InputFile]) -> dict[str, Any] | None:
        return None if self.input == sources.STDLIB else synthetic.answers(sources.root(self.input), inputs)

    def identity(self) -> dict[str, Any]:
        config = super().identity()
        config |= {"text_column": self.columns.text, "columns": self.columns.others}  # as it was when they were keys apart
        if not self.columns.others:
            del config["columns"]
        if self.given_tokenizer is not None:  # what it says, not where it lies
            config["tokenizer"]["path"] = hashlib.sha256(self.given_tokenizer.encode()).hexdigest()
        if self.stages:
            config["stages"] = [stage.identity() for stage in self.stages]
        return config

    def sampled(self, inputs: list[InputFile], fraction: float) -> SampledParts:
        sample = sampling.choose(inputs, fraction, sources.root(self.input).name)
        if not sample.parts:
            raise ConfigError(f"--sample: a share of {fraction:g} of {len(inputs):,} files holds nothing; give a larger one")
        return sample

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> TextMaking:
        source = TextSource(self.input, self.rules)
        if sample is not None:
            source = sampling.SampledTexts(self.input, self.rules, sample.name, sample.records)
        return TextMaking(
            flow=flow, source=source, output=output, stages=self.stages, memory_limit=self.memory_limit, sample=sample,
            tokenizer=self.tokenizer.model_dump(), given_tokenizer=self.given_tokenizer, shard_bytes=self.shard_bytes,
            chunk_tokens=self.chunk_tokens, infill=self.fill_in_the_middle, together=self.together,
        )  # fmt: skip

    def uncovered(self) -> dict[str, dict[str, Any]]:
        stages = [stage.entry() for stage in self.stages]
        by = {"input": sources.absolute(self.input), "rules": asdict(self.rules), "stages": stages}
        return {reasons.PIPELINE: by, **super().uncovered()}
