"""Converts text to token shards, on Ray. Run: `heliostat data prepare pipelines/quickstart.yaml`.

Guarantees: the dataset is a pure function of the configuration and of the input's relative paths and bytes. The SHA-256 of a
document's text selects the document's shard. So one task has all duplicates of a document, and keeps only the duplicate with the
smallest id. Within a shard, documents are sorted by hash: a pseudo-random order that scheduling can't change. Texts and ids never
pass through the driver. Files are read in ranges or streamed. A task uses at most a share of `memory_limit`. One exception: a
task that writes a shard has the complete shard in memory. Dropped documents are listed with the reason in `quarantine.parquet`. A
compressed file can't use more memory or disk than `max_file_bytes` and `max_document_bytes` allow. For Parquet files, heliostat
reads the sizes of row groups from the footers, and doesn't check whether the footers are correct.
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
from heliostat.config import workspace
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
from heliostat.text import plural

log = logging.getLogger(__name__)

LEAST = 257  # minimum vocabulary of a trained tokenizer: 256 bytes and the end of a document


class TokenizerConfig(Strict):
    """Configures the tokenizer: `vocab_size` trains a byte-level BPE; `path` uses a tokenizer.json, or a folder with one."""

    vocab_size: int | None = Field(None, ge=LEAST)
    """Vocabulary size of a byte-level BPE to train. The vocabulary has 256 bytes, the end-of-document token, and merges."""
    train_bytes: int = Field(100_000_000, gt=0)
    """Bytes of text that train the tokenizer, from the documents with the lowest hashes."""
    path: str | None = None
    """Existing tokenizer: a `tokenizer.json`, a folder with a `tokenizer.json`, or `ORG/NAME` of the Hugging Face Hub."""
    end_of_document: str = Field("<|endoftext|>", min_length=1)
    """Token that heliostat appends to each document. An existing tokenizer must have this token."""

    @model_validator(mode="after")
    def _one(self) -> TokenizerConfig:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("set either vocab_size (to train a tokenizer) or path (to use an existing tokenizer), not both")
        return self

    def definition(self) -> str | None:
        """Returns the definition (JSON) of the existing tokenizer; None if `path` isn't set. Raises ConfigError if the file is
        missing or isn't UTF-8."""
        if self.path is None:
            return None
        location = place(self.path, "tokenizer.path").join("tokenizer.json")
        if not location.exists():
            location = place(self.path, "tokenizer.path")
            if location.fs.get_file_info(location.path).type != FileType.File:
                made_by = workspace.pipeline_of(location)
                fix = f"Prepare this dataset first: heliostat data prepare {made_by}" if made_by else "Correct the path"
                raise ConfigError(f"tokenizer.path: {self.path!r}: no such file, and no folder with a tokenizer.json. {fix}")
        try:
            return location.read().decode()
        except UnicodeDecodeError as e:
            raise ConfigError(f"tokenizer.path: {location} isn't UTF-8 text. Use a tokenizer.json") from e


class TextColumns(Strict):
    text: str = "text"
    """Column with the text."""
    others: list[str] = []
    """Further columns to keep with each document, such as `url`, `date`, and `source`. Stages can read these columns."""


class TextPipeline(StagedPipeline):
    """Defines the keys of a text pipeline's YAML; `input` is a file, folder, glob, s3:// prefix, or `python:stdlib`."""

    later = frozenset({"max_document_bytes", "max_file_bytes", "columns", "stages", "exclude", "repositories",
                       "fill_in_the_middle", "together", "record_documents"})  # fmt: skip
    moved = {"text_column": "text"}

    input: str = Field(min_length=1)
    """Input: a file, a folder, a glob (`data/**/*.md`), an `s3://` prefix, a dataset of the Hugging Face Hub
    (`hf://datasets/ORG/NAME`, docs/guides/hub.md), or `python:stdlib`. Kinds of files:
    docs/reference/text-pipeline.md#what-is-read"""
    exclude: list[str] = []
    """Globs of files to skip (`encodings/**`). heliostat matches these globs against paths relative to the input's folder, like a
    glob in `input`."""
    repositories: bool = False
    """Reads only code repositories: the input's archives (`.zip`, and `.tar`, compressed or not) and git clones. See
    docs/data/code.md"""
    tokenizer: TokenizerConfig
    """Tokenizer to train on the text, or existing tokenizer to use unchanged."""
    columns: TextColumns = TextColumns()
    """Names of the columns, in files of records (`.jsonl`, `.parquet`, `.csv`)."""
    normalise: Literal["none", "NFC", "NFKC"] = "NFC"
    """Unicode normal form to which heliostat converts every text first. The normal form affects which documents are equal."""
    min_chars: int = Field(1, ge=1)
    """Minimum characters of a document; shorter documents are dropped (`too_short`)."""
    max_chars: int | None = Field(None, ge=1)
    """Maximum characters of a document; longer documents are dropped (`too_long`). Unset: no limit."""
    max_document_bytes: int = Field(1 << 26, ge=1)
    """Maximum bytes of a document, uncompressed; larger documents are dropped (`too_large`)."""
    max_file_bytes: int = Field(1 << 40, ge=1)
    """Maximum bytes of an input file, both stored and uncompressed. Everything after the limit is dropped (`too_large`)."""
    chunk_tokens: int = Field(1_000_000, gt=0)
    """Approximate tokens per row group. A row group has at most twice as many, because longer documents are split. See
    docs/data/format.md#row-groups"""
    shard_bytes: int = Field(128_000_000, gt=0)
    """Approximate bytes of text per shard. This size limits the memory of the task that writes the shard."""
    fill_in_the_middle: FillInTheMiddle | None = None
    """Rearranges documents, so that a model learns to write the text between a prefix and a suffix. See
    docs/data/fill-in-the-middle.md"""
    together: Together | None = None
    """Groups of documents that stay next to each other, so that a model sees them in one sequence. The documents of a group have
    the same value in a column, such as `repository`. heliostat holds out complete groups. See docs/data/grouping.md"""

    @property
    def rules(self) -> documents.TextRules:
        return documents.TextRules(self.max_document_bytes, self.max_file_bytes, self.columns.text, tuple(self.columns.others),
                               self.normalise, self.min_chars, self.max_chars)  # fmt: skip

    @cached_property
    def given_tokenizer(self) -> str | None:
        return self.tokenizer.definition()

    def check(self) -> None:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ConfigError(
                f"max_chars: {self.max_chars} is below min_chars {self.min_chars}, so no document can pass. "
                "Raise max_chars, or lower min_chars"
            )
        if self.given_tokenizer is not None:
            tokens.end_id(tokens.load(self.given_tokenizer), self.tokenizer.end_of_document)
        if self.fill_in_the_middle:
            self._check_markers()
        self.check_columns(self._known, "columns.others")
        if self.repositories:
            extras.require("curation", "identify", what="repositories: licenses are recognized by their texts, which")
            if self.input == sources.STDLIB:
                raise ConfigError(f"repositories: {sources.STDLIB} isn't a repository. Remove `repositories`, or change `input`")
        if self.together:
            self._check_together(self.together)
        for pattern in self.exclude:
            sources.glob_regex(pattern, "exclude")
        self.check_places(self.input, None if self.input == sources.STDLIB else sources.root(self.input).path)
        for stage in self.stages:
            if stage.of_images:
                raise ConfigError(f"stages: {stage.named()} reads images, but a text pipeline has no images. Remove this stage")
        self.check_stages()  # last, because it may log warnings

    @property
    def _known(self) -> set[str]:
        """Returns the names of the columns that documents have or may have. If the input may contain web archives, includes the
        columns of web archives."""
        crawled = warc.COLUMNS if readers.numbered(self.input) in ("byte", None) else ()
        return {*self.columns.others, *(repositories.COLUMNS if self.repositories else crawled)}

    def _check_together(self, together: Together) -> None:
        """Raises ConfigError if documents don't have the columns that `together` names. The documents of code repositories have
        additional columns, such as `path`."""
        known = {*self.columns.others, *(repositories.COLUMNS if self.repositories else ())}
        for key, name in together.model_dump(exclude_none=True).items():
            if name not in known:
                known_names = f". Columns: {', '.join(sorted(known))}" if known else ""
                raise ConfigError(
                    f"together.{key}: {name!r} isn't a column of the documents{known_names}. Add the column to columns.others"
                )

    def _check_markers(self) -> None:
        """Raises ConfigError if an existing tokenizer has no fill-in-the-middle tokens, or if the vocabulary to train is too
        small for these tokens."""
        if self.given_tokenizer is not None:
            tokenizer = tokens.load(infilling.marking(self.given_tokenizer, infilling.names(tokens.load(self.given_tokenizer))))
            encode(tokenizer, [])
        elif self.tokenizer.vocab_size is not None and self.tokenizer.vocab_size < LEAST + len(OWN):
            raise ConfigError(
                f"tokenizer.vocab_size: {self.tokenizer.vocab_size} has no room for the {len(OWN)} tokens of "
                f"fill_in_the_middle. Set vocab_size to {LEAST + len(OWN)} or more"
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
        config |= {"text_column": self.columns.text, "columns": self.columns.others}  # the keys from when they were separate
        if not self.columns.others:
            del config["columns"]
        if self.given_tokenizer is not None:  # the tokenizer's content counts, not its location
            config["tokenizer"]["path"] = hashlib.sha256(self.given_tokenizer.encode()).hexdigest()
        if self.stages:
            config["stages"] = [stage.identity() for stage in self.stages]
        return config

    def sampled(self, inputs: list[InputFile], fraction: float) -> SampledParts:
        sample = sampling.choose(inputs, fraction, sources.root(self.input).name)
        if not sample.parts:
            raise ConfigError(
                f"--sample: a share of {fraction:g} of {plural(len(inputs), 'file')} is less than one file. Pass a larger share"
            )
        return sample

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> TextMaking:
        if self.shard_bytes * SHARD_SHARE > self.memory_limit:
            log.warning("shard_bytes: a shard of %d bytes needs about %d bytes of memory, more than memory_limit (%d). "
                        "Lower shard_bytes, or raise memory_limit",
                        self.shard_bytes, self.shard_bytes * SHARD_SHARE, self.memory_limit)  # fmt: skip
        source = TextSource(self.input, self.rules)
        if sample is not None:
            source = sampling.SampledTexts(self.input, self.rules, sample.name, sample.records)
        return TextMaking(
            flow=flow, source=source, output=output, stages=self.stages, memory_limit=self.memory_limit, sample=sample,
            tokenizer=self.tokenizer.model_dump(), given_tokenizer=self.given_tokenizer, shard_bytes=self.shard_bytes,
            chunk_tokens=self.chunk_tokens, infill=self.fill_in_the_middle, together=self.together,
            every=self.every(sample),
        )  # fmt: skip

    def uncovered(self) -> dict[str, dict[str, Any]]:
        stages = [stage.entry() for stage in self.stages]
        by = {"input": sources.absolute(self.input), "rules": asdict(self.rules), "stages": stages}
        by |= synthetic.writer(self._written_by)
        return {reasons.PIPELINE: by, **super().uncovered()}
