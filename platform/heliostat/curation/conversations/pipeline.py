"""Makes datasets of conversations for supervised fine-tuning, and of preferences for DPO, on Ray. Run: `heliostat data prepare
pipelines/conversations.yaml`.

Guarantees: the dataset is a pure function of the configuration, and of the relative paths and bytes of the input files. The hash
of a conversation's first message of the user decides its shard, and whether it is held out. So all answers to a prompt are held
out together. Of equal conversations, the dataset has only one. A pack contains complete conversations.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from heliostat.curation.conversations import rendering, shapes, templates
from heliostat.curation.conversations.making import VERSION, ConversationMaking
from heliostat.curation.conversations.reading import ConversationSource, RecordRules, StoredDialect, TooLong
from heliostat.curation.conversations.rendering import Dialect, Renderer, Turns
from heliostat.curation.prepare import InputFile, place
from heliostat.curation.sampled import SampledParts
from heliostat.curation.staged import StagedPipeline
from heliostat.curation.text import sources
from heliostat.curation.text.pipeline import TokenizerConfig
from heliostat.data import versions
from heliostat.data.manifest import FILES
from heliostat.errors import ConfigError
from heliostat.schema import Strict
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow
from heliostat.text import brief

log = logging.getLogger(__name__)


class ExistingTokenizer(Strict):
    """Configures a tokenizer without a model."""

    path: str
    """Tokenizer: a `tokenizer.json`, a folder with a `tokenizer.json`, or `ORG/NAME` of the Hugging Face Hub."""
    end_of_document: str = Field("<|endoftext|>", min_length=1)
    """Token that ends a document. The tokenizer must have this token."""


class RenderedPipeline(StagedPipeline):
    """Defines the keys that pipelines of conversations and of preferences share."""

    later = frozenset({"record_documents"})
    beside = frozenset({"work", "keep_work", "memory_limit"})

    input: str = Field(min_length=1)
    """Input: a file, a folder, a glob (`data/**/*.jsonl`), an `s3://` prefix, or a dataset of the Hugging Face Hub
    (`hf://datasets/ORG/NAME`, docs/guides/hub.md). Files: `.jsonl`, `.parquet`, `.csv`, and `.arrow`, also compressed."""
    exclude: list[str] = []
    """Globs of files to skip. heliostat matches the globs against paths relative to the input's folder."""
    model: str | None = None
    """Folder of the model to train, or `ORG/NAME` of the Hugging Face Hub. Its tokenizer and its chat template render the
    conversations."""
    tokenizer: ExistingTokenizer | None = None
    """Tokenizer, if there is no folder of a model. Set `template`, too."""
    template: str | None = None
    """Chat template: `chatml`, `llama3`, or the path of a `.jinja` file. Unset: the template of the model's tokenizer."""
    sequence_length: int = Field(2048, ge=2)
    """Maximum tokens of a row."""
    chunk_tokens: int = Field(1_000_000, gt=0)
    """Approximate tokens per row group. Conversations are packed within a row group."""
    shard_bytes: int = Field(128_000_000, gt=0)
    """Approximate bytes of text per shard. This size limits the memory of the task that writes the shard."""

    @cached_property
    def dialect(self) -> Dialect:
        """Returns the tokenizer and the template. Raises ConfigError if one of them is missing or can't be used."""
        if (self.model is None) == (self.tokenizer is None):
            raise ConfigError("model: set either model, or tokenizer without a model. The tokenizer and the template must be the "
                "ones of the model that you train")  # fmt: skip
        named = self._named()
        if self.tokenizer is not None:
            if named is None:
                raise ConfigError("template: a tokenizer without a model has no chat template. Set template to chatml, "
                    "llama3, or a .jinja file")  # fmt: skip
            config = TokenizerConfig(path=self.tokenizer.path, end_of_document=self.tokenizer.end_of_document)
            definition, end = config.definition() or "", self.tokenizer.end_of_document
            return Dialect(definition, named, {"eos_token": end}, end)
        return self._of_model(named)

    def _named(self) -> str | None:
        if self.template is None or self.template in templates.NAMED:
            return templates.NAMED[self.template] if self.template else None
        if not self.template.endswith(".jinja"):
            raise ConfigError(f"template: {self.template!r} is neither {', '.join(templates.NAMED)}, nor a .jinja file")
        try:
            return place(self.template, "template").read().decode()
        except (FileNotFoundError, UnicodeDecodeError) as e:
            raise ConfigError(f"template: {self.template!r}: no such file, or not UTF-8 text. Correct the path") from e

    def _of_model(self, named: str | None) -> Dialect:
        from transformers import AutoTokenizer

        from heliostat.recipes.pretrained import from_folder

        assert self.model is not None
        folder = place(self.model, "model").path
        if not Path(folder).is_dir():
            raise ConfigError(f"model: {self.model!r}: no such folder. Run: hf download {self.model} --local-dir models/NAME")
        try:
            tokenizer = from_folder("model", AutoTokenizer, folder)
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(f"model: {self.model!r} has no tokenizer that transformers can read ({brief(e, 200)})") from e
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"model: {self.model!r} has a tokenizer without a tokenizer.json. Convert it to a fast tokenizer")
        template = named
        if template is None:
            try:
                template = tokenizer.get_chat_template()
            except ValueError as e:
                raise ConfigError(
                    f"model: {self.model!r} has no chat template, or several. Set template: chatml, llama3, or a .jinja file"
                ) from e
        if tokenizer.eos_token is None:
            raise ConfigError(f"model: {self.model!r} has no token that ends a document (eos_token). Add it to the tokenizer")
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return Dialect(tokenizer.backend_tokenizer.to_str(), template, special, tokenizer.eos_token)

    def renderer(self) -> Renderer:
        return Renderer(self.dialect)

    def check(self) -> None:
        self._check_special()
        self.renderer().end  # noqa: B018 - renders an example
        for number, stage in enumerate(self.stages):
            if stage.of_images:
                raise ConfigError(
                    f"stages.{number}: {stage.named()} reads images, but conversations have none. Remove this stage"
                )
            if stage.edits():
                raise ConfigError(
                    f"stages.{number}: {stage.named()} changes texts, but conversations can only be kept or dropped. Remove this "
                    "stage, or run it on the input first"
                )
            stage.check()
        self.check_columns((), "")
        for pattern in self.exclude:
            sources.glob_regex(pattern, "exclude")
        self.check_places(self.input, sources.root(self.input).path)

    def _check_special(self) -> None:
        """Raises ConfigError if the template is of another model: it writes special tokens that the tokenizer doesn't have."""
        renderer = self.renderer()
        known = {token.content for token in renderer.tokenizer.get_added_tokens_decoder().values()}
        written = templates.special(self.dialect.template)
        if self.template is not None and (absent := sorted(written - known)):
            raise ConfigError(
                f"template: {self.template!r} writes {', '.join(absent)}, which the tokenizer doesn't have. Use the template of "
                "the model, or add the tokens to the tokenizer and to the model"
            )

    def inputs(self) -> list[InputFile]:
        return sources.without(sources.listing(self.input), self.exclude)

    def identity(self) -> dict[str, Any]:
        config = super().identity() | {"dialect": self.dialect.digest, "versions": [VERSION, rendering.VERSION, shapes.VERSION]}
        for name in ("model", "tokenizer", "template"):  # their content counts, not their location
            del config[name]
        config["stages"] = [stage.identity() for stage in self.stages]
        return config

    def _making(self, flow: Flow, output: Location, source: dict[str, Any], best_fit: bool, every: int) -> ConversationMaking:
        renderer, dialect = self.renderer(), self.dialect
        path = versions.store(output, f"{FILES}/tokenizer-", dialect.definition.encode(), ".json")
        stored = StoredDialect(
            output.uri, path, dialect.template, tuple(sorted(dialect.special.items())), dialect.end_of_document
        )
        return ConversationMaking(
            flow=flow, output=output, stages=self.stages, memory_limit=self.memory_limit,
            source=ConversationSource(self.input, stored=stored, turns=renderer.turns, end_of_turn=renderer.end_of_turn,
                                      sequence_length=self.sequence_length, **source),
            tokenizer={"end_of_document": dialect.end_of_document}, given_tokenizer=dialect.definition,
            shard_bytes=self.shard_bytes, renderer=renderer, chunk_tokens=self.chunk_tokens, best_fit=best_fit, every=every,
        )  # fmt: skip


class ConversationPipeline(RenderedPipeline):
    """Defines the keys of a pipeline's YAML for conversations. Its dataset trains `heliostat.recipes:SFT`."""

    shape: shapes.Shape = "auto"
    """Shape of the records: `messages`, `completion`, `alpaca`, or `sharegpt`. `auto` decides for each record, by its columns.
    See docs/data/conversations.md#shapes"""
    too_long: TooLong = "drop"
    """What happens to a conversation of more than `sequence_length` tokens. `drop`: drops it. `cut`: keeps its beginning, up to
    the last trained token. `split`: splits it before messages of the user, and repeats the system prompt."""
    turns: Turns = "all"
    """Turns of the assistant that the model learns: `all`, or only the `last`."""
    end_of_turn: bool = True
    """Whether the model learns the token that ends a turn. Without it, a model doesn't learn when to stop."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """`best_fit`: a row has several conversations, up to `sequence_length` tokens. `none`: a row has one conversation."""

    def renderer(self) -> Renderer:
        return Renderer(self.dialect, self.turns, self.end_of_turn)

    def check(self) -> None:
        if self.too_long == "split" and self.turns == "last":
            raise ConfigError(
                "too_long: with turns: last, only the last part of a split conversation has trained tokens. Set too_long to drop "
                "or cut, or turns to all"
            )
        super().check()

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> ConversationMaking:
        source = {"rules": RecordRules(normalise="none", shape=self.shape), "too_long": self.too_long}
        return self._making(flow, output, source, self.packing == "best_fit", self.every(sample))


class PreferencePipeline(RenderedPipeline):
    """Defines the keys of a pipeline's YAML for preferences. A record has the columns `chosen` and `rejected`, and maybe
    `prompt`. The dataset trains `heliostat.recipes:DPO`."""

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> ConversationMaking:
        source = {"rules": RecordRules(normalise="none", shape="pairs"), "too_long": "drop"}
        return self._making(flow, output, source, False, self.every(sample))
