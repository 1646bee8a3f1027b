"""Runs texts through a Hugging Face folder's model: safetensors and tokenizer.json alone, no code of the folder's.

What is computed of a text, such as a classifier's score, does not depend on the texts with it: texts are padded to lengths that
follow from their own, and batches are always full, so that every text of a length goes through the same kernels.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field, model_validator

from heliostat.curation.stage import Document, Outcome, Stage, Work
from heliostat.errors import ConfigError
from heliostat.schema import Float, nearest
from heliostat.tasks import files
from heliostat.tasks.libraries import MODELS

if TYPE_CHECKING:
    from tokenizers import Encoding
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

Value = TypeVar("Value")
Config = dict[str, Any]  # a folder's JSON, as it was saved
LEAST_TOKENS = 32  # that a text is padded to
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def describe(folder: str, name: str = "model") -> Config:
    """Reads the folder's config.json; ConfigError, which begins with `name`, if something that is needed is not there."""
    config = read_json(folder, CONFIG, name)
    require_files(folder, name)
    return config


def read_json(folder: str, file: str, name: str = "model") -> Config:
    """Reads a mapping of the folder; ConfigError if it is none, or needs code that the folder brings."""
    try:
        config = json.loads(files.read(name, str(Path(folder) / file)))
        fault = "" if isinstance(config, dict) else "is no mapping"
    except ValueError as e:
        config, fault = {}, f"is not JSON ({e})"
    if fault:
        raise ConfigError(f"{name}: {folder!r}: {file} {fault}; name a folder that save_pretrained has written")
    if "auto_map" in config:
        raise ConfigError(
            f"{name}: {folder!r} needs code that it brings ({file}: auto_map), which is not run; take another model"
        )
    return config


def require_files(folder: str, name: str = "model", tokenizer: bool = True) -> None:
    """Raises ConfigError if the folder has no safetensors, or lacks the tokenizer."""
    if not weights(folder):
        raise ConfigError(f"{name}: {folder!r} has no safetensors; save it by save_pretrained")
    if tokenizer and not (Path(folder) / TOKENIZER).is_file():
        raise ConfigError(f"{name}: {folder!r} has no {TOKENIZER}; save it by save_pretrained, with its fast tokenizer")


def weights(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def labels(config: Config) -> list[str]:
    """Lists the labels in the order of the model's outputs."""
    named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return [named[key] for key in sorted(named, key=int)]


def require_label(label: str, config: Config) -> None:
    known = labels(config)
    if label not in known:
        raise ConfigError(f"label: {label!r} is none of the model's, {', '.join(known)}{nearest(label, known)}")


def label_scores(logits: Tensor, place: int, config: PretrainedConfig) -> list[float]:
    """Computes the scores of the label at a place: probabilities, or the outputs of a model with one, such as grades."""
    values = logits.float()
    if values.shape[-1] > 1:
        values = values.sigmoid() if config.problem_type == "multi_label_classification" else values.softmax(-1)
    return [round(value, 5) for value in values[:, place].tolist()]


def digests(folder: str) -> dict[str, str]:
    paths = [*weights(folder), Path(folder) / CONFIG, Path(folder) / TOKENIZER]
    return {path.name: files.digest("model", str(path)) for path in paths}


def padded(tokens: int, most: int) -> int:
    """Returns the length that a text of so many tokens is padded to: a power of two, or one and a half of one."""
    length = LEAST_TOKENS
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return min(length, max(most, tokens))


def check_length(config: Config, max_tokens: int) -> None:
    """Raises ConfigError if the model cannot read so many tokens."""
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and max_tokens > most:
        raise ConfigError(f"max_tokens: {max_tokens:,} is more than the model can read; give at most {most:,}")


class NamesModel(Stage):
    """Holds the folder of a model: of texts, where a subclass says nothing else."""

    libraries: ClassVar[tuple[str, ...]] = MODELS
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(min_length=1)
    """The model's folder, or `ORG/NAME` of the Hugging Face Hub (docs/guides/hub.md). Nodes that lack it get a copy of its
    files, without pickles."""

    def digests(self) -> dict[str, object]:
        return {"model": digests(self.model)}


class ModelStage(NamesModel):
    """Runs documents one by one through a folder's model."""

    def open(self) -> Work:
        self.check()
        compute = self.computing()
        return lambda documents: [self.outcome(d, *values) for d, values in zip(documents, compute(documents), strict=True)]

    @abstractmethod
    def computing(self) -> Callable[[list[Document]], Sequence[tuple[object, ...]]]:
        """Loads the model, and returns what computes the values of documents that `outcome` takes."""

    @abstractmethod
    def outcome(self, document: Document, *values: Any, **none: Any) -> Outcome:
        """Decides on a document by its values."""


class ScoringStage(ModelStage):
    """Drops what a folder's model scores too low or too high; a subclass computes the scores."""

    gpu: ClassVar[bool] = True
    limits: ClassVar = {
        "low_score": ("score", "min_score", "a score below {}"),
        "high_score": ("score", "max_score", "a score above {}"),
    }

    min_score: Float | None = None
    """The least score that is kept (`low_score`)."""
    max_score: Float | None = None
    """The largest score that is kept (`high_score`)."""
    column: str = Field("score", min_length=1)
    """The column that the score becomes."""

    @model_validator(mode="after")
    def _one(self) -> ScoringStage:
        if self.min_score is None and self.max_score is None:
            raise ValueError("give min_score, max_score or both")
        return self

    def outcome(self, document: Document, score: float, cut: bool = False) -> Outcome:
        return self.judged(document, {"score": score}, {"cut_to_max_tokens": 1} if cut else {}, {self.column: score})


class Reader(ABC, Generic[Value]):
    """Runs texts, or pairs of them, through a folder's model, on a GPU if there is one; a subclass says which, and what of its
    output. Of a pair that is longer than `max_tokens` the second text is cut."""

    pairs = False

    def __init__(self, folder: str, what: str, max_tokens: int, batch: int, name: str = "model") -> None:
        import torch
        from tokenizers import Tokenizer

        self.batch, self.max_tokens = batch, max_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = Tokenizer.from_file(str(Path(folder) / TOKENIZER))
            model = self.load(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        except Exception as e:  # of many kinds: what is wrong with a folder of others
            fault = str(e).partition("\n")[0]
            raise ConfigError(f"{name}: {folder!r} cannot be loaded as {what} ({fault})") from e
        self.model = model.eval().to(self.device)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens, strategy="only_second" if self.pairs else "longest_first")
        self.pad = model.config.pad_token_id or 0
        self.typed = self.pairs and getattr(model.config, "type_vocab_size", 1) > 1

    @abstractmethod
    def load(self, folder: str, **options: object) -> PreTrainedModel:
        """Loads the folder's model, with these options of transformers."""

    def __call__(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[tuple[Value, bool]]:
        """Returns (what is computed, whether the text, or the pair, was longer than max_tokens) of each."""
        encoded = self.tokenizer.encode_batch(texts)
        by_length = dict[int, list[int]]()
        for i, one in enumerate(encoded):
            by_length.setdefault(padded(len(one.ids), self.max_tokens), []).append(i)
        computed: dict[int, Value] = {}
        for length, which in sorted(by_length.items()):
            for start in range(0, len(which), self.batch):
                part = which[start : start + self.batch]
                for i, value in zip(part, self._computed([encoded[i] for i in part], length), strict=False):
                    computed[i] = value
        return [(computed[i], bool(one.overflowing)) for i, one in enumerate(encoded)]

    def _computed(self, rows: list[Encoding], length: int) -> list[Value]:
        import torch

        rows = rows + [rows[0]] * (self.batch - len(rows))

        def tensor(lists: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([one + [fill] * (length - len(one)) for one in lists], device=self.device)

        ids, mask = tensor([row.ids for row in rows], self.pad), tensor([[1] * len(row.ids) for row in rows], 0)
        types = {"token_type_ids": tensor([row.type_ids for row in rows], 0)} if self.typed else {}
        with torch.inference_mode():
            return self.values(self.model(input_ids=ids, attention_mask=mask, **types), ids, mask)

    @abstractmethod
    def values(self, output: Any, ids: Tensor, mask: Tensor) -> list[Value]:
        """Computes a value for each row of a batch from the model's output, the tokens and which of them count."""


class SequenceClassifier(Reader[float]):
    def load(self, folder: str, **options: object) -> PreTrainedModel:
        import transformers

        from heliostat.recipes.pretrained import whole

        return whole("model", transformers.AutoModelForSequenceClassification, folder, **options)


class Scorer(SequenceClassifier):
    def __init__(self, folder: str, label: str, max_tokens: int, batch: int) -> None:
        self.place = labels(describe(folder)).index(label)
        super().__init__(folder, "a sequence classifier", max_tokens, batch)

    def values(self, output: Any, ids: Tensor, mask: Tensor) -> list[float]:
        return label_scores(output.logits, self.place, self.model.config)


class Likelihood(Reader[float | None]):
    """Measures the mean negative logarithm of the probabilities that a causal language model gives a text's tokens, behind the
    first; None for one token, or none. ConfigError if a model gives what is not finite."""

    def __init__(self, folder: str, max_tokens: int, batch: int) -> None:
        self.folder = folder
        super().__init__(folder, "a causal language model", max_tokens, batch)

    def load(self, folder: str, **options: object) -> PreTrainedModel:
        import transformers

        from heliostat.recipes.pretrained import whole

        return whole("model", transformers.AutoModelForCausalLM, folder, **options)

    def values(self, output: Any, ids: Tensor, mask: Tensor) -> list[float | None]:
        from torch.nn.functional import cross_entropy

        def mean(logits: Tensor, row: Tensor, count: int) -> float | None:
            if count < 2:
                return None
            nats = float(cross_entropy(logits[: count - 1].float(), row[1:count]))
            if not math.isfinite(nats):
                raise ConfigError(f"model: {self.folder!r} gives probabilities that are not finite; take another model")
            return nats

        lengths = mask.sum(1).tolist()
        return [mean(logits, row, count) for logits, row, count in zip(output.logits, ids, lengths, strict=True)]
