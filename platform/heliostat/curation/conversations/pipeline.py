"""Makes datasets of conversations for supervised fine-tuning, and of preferences for DPO, on Ray. Run: `heliostat data prepare
pipelines/conversations.yaml`.

Guarantees: the dataset is a pure function of the configuration, and of the relative paths and bytes of the input files. The hash
of a conversation's first message of the user decides its shard, and whether it is held out. So all answers to a prompt are held
out together. Of equal conversations, the dataset has only one. A pack contains complete conversations.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from heliostat.curation import reasons, synthetic
from heliostat.curation.conversations import dialects, reading, rendering, shapes
from heliostat.curation.conversations.dialects import ExistingTokenizer
from heliostat.curation.conversations.making import VERSION, ConversationMaking
from heliostat.curation.conversations.reading import ConversationSource, RecordRules, StoredDialect, TooLong
from heliostat.curation.conversations.rendering import Dialect, Renderer, Turns
from heliostat.curation.prepare import InputFile, place
from heliostat.curation.sampled import SampledParts
from heliostat.curation.staged import StagedPipeline
from heliostat.curation.text import sources
from heliostat.data import versions
from heliostat.data.manifest import FILES
from heliostat.errors import ConfigError
from heliostat.schema import nearest
from heliostat.storage.locations import Location
from heliostat.tasks.flow import Flow


class RenderedPipeline(StagedPipeline):
    """Defines the keys that pipelines of conversations and of preferences share."""

    later = frozenset({"record_documents"})

    input: str = Field(min_length=1)
    """Input: a file, a folder, a glob (`data/**/*.jsonl`), an `s3://` prefix, or a dataset of the Hugging Face Hub
    (`hf://datasets/ORG/NAME`, docs/guides/hub.md). Files: `.jsonl`, `.parquet`, `.csv`, and `.arrow`, also compressed."""
    columns: dict[str, str] = {}
    """Names of the input's columns, where they differ from the names of the shapes: `{prompt: question, completion: answer}`."""
    exclude: list[str] = []
    """Globs of files to skip. heliostat matches the globs against paths relative to the input's folder."""
    model: str | None = None
    """Folder of the model to train, or `ORG/NAME` of the Hugging Face Hub. Its tokenizer and its chat template render the
    conversations."""
    tokenizer: ExistingTokenizer | None = None
    """Tokenizer, if `model` is unset. Set `template`, too."""
    template: str | None = None
    """Chat template: `chatml`, `llama3`, `plain` (for any tokenizer), or the path of a `.jinja` file. Unset: the template of the
    model's tokenizer."""
    sequence_length: int = Field(2048, ge=2)
    """Maximum tokens of a row."""
    chunk_tokens: int = Field(1_000_000, gt=0)
    """Approximate tokens per row group. Conversations are packed within a row group."""
    shard_bytes: int = Field(128_000_000, gt=0)
    """Approximate bytes of text per shard. This size limits the memory of the task that writes the shard."""

    @cached_property
    def dialect(self) -> Dialect:
        return dialects.of(self.model, self.tokenizer, self.template)

    def renderer(self) -> Renderer:
        return Renderer(self.dialect)

    def check(self) -> None:
        for name in self.columns:
            if name not in shapes.COLUMNS:
                fix = nearest(name, sorted(shapes.COLUMNS)) or f". Columns: {', '.join(sorted(shapes.COLUMNS))}"
                raise ConfigError(f"columns: {name!r} isn't a column of a shape{fix}")
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
        self.check_stages()
        self.check_columns((), "")
        for pattern in self.exclude:
            sources.glob_regex(pattern, "exclude")
        self.check_places(self.input, None if self.input == sources.STDLIB else sources.root(self.input).path)

    def inputs(self) -> list[InputFile]:
        return sources.without(sources.listing(self.input), self.exclude)

    def written_by(self, inputs: list[InputFile]) -> dict[str, Any] | None:
        return None if self.input == sources.STDLIB else synthetic.answers(sources.root(self.input), inputs)

    def identity(self) -> dict[str, Any]:
        of_records = reading.version(self.shaped, self.fitting, self.renderer().turns)
        versions_of_rules = [VERSION, rendering.VERSION, of_records]
        config = super().identity() | {"dialect": self.dialect.digest, "versions": versions_of_rules}
        for name in ("model", "tokenizer", "template"):  # their content counts, not their location
            del config[name]
        config["stages"] = [stage.identity() for stage in self.stages]
        return config

    @property
    def shaped(self) -> str:
        """Returns the shape of the records."""
        return "pairs"

    @property
    def fitting(self) -> TooLong:
        """Returns what happens to records of more than `sequence_length` tokens."""
        return "drop"

    def source(self, output: Location, tokenizer: str) -> ConversationSource:
        """Returns the reader of the input. `tokenizer`: the path of the tokenizer in the dataset's folder."""
        renderer, dialect = self.renderer(), self.dialect
        special = tuple(sorted(dialect.special.items()))
        stored = StoredDialect(output.uri, tokenizer, dialect.template, special, dialect.end_of_document)
        rules = RecordRules(normalise="none", shape=self.shaped, names=tuple(sorted(self.columns.items())))
        return ConversationSource(self.input, rules, stored, renderer.turns, renderer.end_of_turn, self.sequence_length,
                                  self.fitting)  # fmt: skip

    def uncovered(self) -> dict[str, dict[str, Any]]:
        by = reading.made_by(self.source(place(self.output, "output"), ""))
        by["stages"] = [stage.entry() for stage in self.stages]
        by |= synthetic.writer(self._written_by)
        return {reasons.PIPELINE: by, **super().uncovered()}

    def _making(self, flow: Flow, output: Location, best_fit: bool, every: int) -> ConversationMaking:
        renderer, dialect = self.renderer(), self.dialect
        path = versions.store(output, f"{FILES}/tokenizer-", dialect.definition.encode(), ".json")
        return ConversationMaking(
            flow=flow, output=output, stages=self.stages, memory_limit=self.memory_limit, source=self.source(output, path),
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
    """Turns of the assistant that the model learns: `all`, or only the `last`. `each`: all turns, each with the messages
    before it as a conversation of its own, for templates that render earlier turns in another way than the last turn."""
    end_of_turn: bool = True
    """Whether the model learns the token that ends a turn. Without it, a model doesn't learn when to stop."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """`best_fit`: a row has several conversations, up to `sequence_length` tokens. `none`: a row has one conversation."""

    @property
    def shaped(self) -> str:
        return self.shape

    @property
    def fitting(self) -> TooLong:
        return self.too_long

    def renderer(self) -> Renderer:
        return Renderer(self.dialect, self.turns, self.end_of_turn)

    def check(self) -> None:
        if self.too_long == "split" and self.turns != "all":
            raise ConfigError(
                f"too_long: with turns: {self.turns}, only the last part of a split conversation has trained tokens. Set "
                "too_long to drop or cut, or turns to all"
            )
        super().check()

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> ConversationMaking:
        return self._making(flow, output, self.packing == "best_fit", self.every(sample))


class PreferencePipeline(RenderedPipeline):
    """Defines the keys of a pipeline's YAML for preferences. A record has the columns `chosen` and `rejected`, and maybe
    `prompt`. The dataset trains `heliostat.recipes:DPO`."""

    def renderer(self) -> Renderer:
        return Renderer(self.dialect, "last")

    def making(self, flow: Flow, output: Location, sample: SampledParts | None = None) -> ConversationMaking:
        return self._making(flow, output, False, self.every(sample))
