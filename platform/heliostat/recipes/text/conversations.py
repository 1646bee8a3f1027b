"""Trains language models on datasets of conversations (`data.conversations`). `SFT` and other recipes derive from this class.

The tokens per sample are a fact of the dataset. The model's tokenizer and chat template must be those of the dataset. An export
has the dataset's template, and its answers stop at the tokens that end the assistant's turns.
"""

from __future__ import annotations

import itertools
import logging
import sys
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from heliostat.config.spec import Job
from heliostat.data.conversations import CONTENTS, FACT, ConversationFacts
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.protocol import Batch, Draws, Gallery
from heliostat.recipes.text import templates
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.schema import Strict, validate_key

if TYPE_CHECKING:
    from heliostat.recipes.text.answers import TokenPrompt
    from heliostat.recipes.text.exporting import ExportedChat

log = logging.getLogger(__name__)

SHOWN_PROMPTS, SHOWN_TOKENS = 2, 64  # prompts, and tokens per answer, to show a finished run
ALSO_END = ("<|eom_id|>",)  # ends a turn of Llama 3 that calls a built-in tool
ASSUMED = 2048  # tokens per sample until the dataset exists


class AnswerSamples(Strict):
    """Defines the prompts that the model answers at each evaluation, greedily."""

    prompts: list[str] = []
    """User messages. Each message is the first message of a conversation."""
    held_out: int = Field(4, ge=0, le=32)
    """Number of held-out conversations whose prompts the model answers, up to the first trained turn."""
    max_tokens: int = Field(64, ge=1)
    """Maximum tokens of an answer."""


class ConversationKeys(Strict):
    """Defines the keys of `model` that don't belong to the architecture."""

    samples: AnswerSamples | None = Field(default_factory=lambda: AnswerSamples.model_validate({}))
    """Prompts that the model answers at each evaluation. `null`: none."""

    chat_template: Literal["dataset"] | None = None
    """`dataset`: trains a pretrained model on the dataset's chat template, even if the model has another template. The export has
    the dataset's template."""


K = TypeVar("K", bound=ConversationKeys)


class LearnsConversations(CausalLM, Draws):
    """Reads the facts of datasets of conversations. `form`: the form of the rows that the recipe trains on."""

    kind = "rows"
    rendered = True
    form: ClassVar[str]
    pipeline: str  # makes datasets of this form
    own: ClassVar[type[ConversationKeys]] = ConversationKeys

    def __init__(self, job: Job) -> None:
        names = self.own.model_fields
        self.keys = validate_key(self.own, {key: value for key, value in job.model.items() if key in names}, "model")
        self.facts: list[ConversationFacts] = []  # of each dataset; empty until the datasets are known
        super().__init__(job.model_copy(update={"model": {k: v for k, v in job.model.items() if k not in names}}))
        self.terms_per_sample = None
        shared = [key for key in ("sequence", "tensor") if getattr(job.train.parallel, key) > 1]
        if shared and job.model.get("samples"):
            raise ConfigError(
                f"model.samples: not supported with train.parallel.{shared[0]}, whose workers compute each sample together. "
                "Remove this key"
            )
        self.draws = self.keys.samples is not None and not shared

    def sample_length(self, job: Job) -> int:
        if job.data.sequence_length:
            raise ConfigError(
                "data.sequence_length: only for token datasets. Remove this key. The samples have the sequence_length of the "
                "dataset's pipeline"
            )
        return ASSUMED

    def _require_positions(self, longest: int | None) -> None:
        if self.facts and longest and 0 < longest < self.length:
            raise ConfigError(
                f"data.sources: the samples have up to {self.length} tokens, which is above the model's max_position_embeddings. "
                f"Prepare the dataset with sequence_length: {longest}"
            )

    def probe(self) -> None:
        super().probe()
        if self.keys.samples and self.keys.samples.prompts and not self.job.evaluate:
            log.warning(
                "model.samples.prompts: answered only at the end of the run. To answer them during the run, set evaluate.every"
            )

    def assumed(self) -> str:
        assumed = [super().assumed(), f"until the dataset is prepared, heliostat assumes samples of {ASSUMED:,} tokens"]
        return "; ".join(filter(None, assumed))

    def bind(self, sources: list[Manifest]) -> None:
        self.facts = [self._facts_of(number, source) for number, source in enumerate(sources)]
        if len({facts["template"] for facts in self.facts}) > 1:
            raise ConfigError("data.sources: the datasets have different chat templates. Prepare all of them with one template")
        self.length = max(facts["sequence_length"] for facts in self.facts)
        vars(self).pop("config", None)  # its positions depend on the length
        super().bind(sources)
        if self.plain:
            self._require_positions(self.plain.max_position_embeddings)
        else:
            assert self.config  # checks the positions
        parts = self.job.train.parallel.sequence
        if self.length % parts:
            raise ConfigError(
                f"train.parallel.sequence: {parts} doesn't divide the samples' {self.length} tokens. Prepare the dataset with a "
                f"sequence_length of {self.length // parts * parts}"
            )
        if self.pretrained and self.keys.chat_template is None:
            templates.require_same(Path(self.pretrained), sources[0], self.facts[0]["template"])

    def _facts_of(self, number: int, source: Manifest) -> ConversationFacts:
        """Returns the facts of a dataset. Raises ConfigError if the dataset doesn't have this recipe's form."""
        facts = source.meta.get(FACT)
        if facts is None or facts["form"] != self.form:
            contents = f"a dataset of {CONTENTS[facts['form']]}" if facts else "no dataset of conversations"
            raise ConfigError(
                f"data.sources.{number}.path: {str(source.location)!r} contains {contents}, but {type(self).__name__} trains on "
                f"{CONTENTS[self.form]}. Set the path to a dataset of {self.pipeline}, or change recipe"
            )
        return cast("ConversationFacts", facts)

    @abstractmethod
    def presume(self, rows: int) -> pa.Table:
        """Returns placeholder rows of the full length."""

    @abstractmethod
    def rows(self, content: pa.Table) -> Batch:
        """Makes a batch of the dataset's rows."""

    def batch(self, content: np.ndarray | pa.Table, keys: np.ndarray | None = None) -> Batch:
        """Makes a batch of rows. Tests of an architecture pass token samples instead, int32 [batch, length]."""
        return super().batch(content, keys) if isinstance(content, np.ndarray) else self.rows(content)

    # the export ------------------------------------------------------------------------------------------------------

    @property
    def ends(self) -> list[int]:
        """Returns the tokens that end the assistant's turns."""
        return sorted({facts["end"] for facts in self.facts})

    def chat(self) -> ExportedChat:
        from heliostat.recipes.text.exporting import ExportedChat

        template = templates.of_dataset(self.sources[0], self.facts[0]["template"])
        others = (self.raw_tokenizer.token_to_id(name) for name in ALSO_END if name in template)
        return ExportedChat(template, sorted({*self.ends, *(token for token in others if token is not None)}))

    # answers ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def prompts_of(self, content: pa.Table) -> Iterator[TokenPrompt]:
        """Yields the prompts of rows, and the dataset's own answers."""

    def gallery(self) -> Gallery | None:
        """Returns the prompts to answer after every evaluation; None if there are none."""
        from heliostat.recipes.text.answers import AnswerGallery

        return AnswerGallery(self) if self.draws and self.answered else None

    @property
    def max_answer(self) -> int:
        return self.keys.samples.max_tokens if self.keys.samples else SHOWN_TOKENS

    @cached_property
    def answered(self) -> list[TokenPrompt]:
        """Returns the prompts to answer: those of the job, and those of held-out conversations. Leaves out prompts after which
        the model has no positions for an answer."""
        from heliostat.recipes.text import answers, exporting

        samples = self.keys.samples or AnswerSamples.model_validate({})
        tokenizer = exporting.tokenizer_of(self.pretrained, self.tokenizer, self.chat()) if samples.prompts else None
        questions = answers.asked(tokenizer, samples.prompts) if tokenizer else []
        content = cast("pa.Table", exporting.some(self.job, self.sources))
        room = (getattr(self.config, "max_position_embeddings", None) or sys.maxsize) - self.max_answer
        for number, question in enumerate(questions):
            if len(question.tokens) > room:
                raise ConfigError(
                    f"model.samples.prompts.{number}: {len(question.tokens):,} tokens, and max_tokens leaves {room:,} of the "
                    "model's positions. Shorten this prompt, or lower max_tokens"
                )
        held_out = (prompt for prompt in self.prompts_of(content) if len(prompt.tokens) <= room)
        return [*questions, *itertools.islice(held_out, samples.held_out)]

    @cached_property
    def prompts(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.raw_tokenizer.decode(one.tokens, skip_special_tokens=False) for one in self.answered[:SHOWN_PROMPTS])

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        from heliostat.recipes.text import answers

        shown = self.answered[:SHOWN_PROMPTS]
        if not shown:
            return []
        tokens = [one.tokens for one in shown]
        written = answers.write(self.load(folder).eval(), "cpu", tokens, self.ends, self.max_answer)
        return [
            (prompt, self.raw_tokenizer.decode(answer.tolist())) for prompt, answer in zip(self.prompts, written, strict=True)
        ]
