"""Runs texts through the model in a Hugging Face folder. This module reads only safetensors and tokenizer.json, and runs no code
from the folder.

The result for a text, such as a classifier's score, doesn't depend on the other texts in its batch: the padded length of a text
depends only on the length of this text, and batches are always full. So texts of the same length use the same kernels.
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
Config = dict[str, Any]  # a folder's config.json
LEAST_TOKENS = 32  # minimum padded length of a text, in tokens
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def require_folder(folder: str, name: str = "model") -> None:
    """Raises ConfigError, which begins with `name`, if the folder is missing."""
    if not Path(folder).exists():
        raise ConfigError(
            f"{name}: {folder!r}: no such folder. Set {name} to a model's folder, for example after hf download ORG/NAME "
            "--local-dir FOLDER"
        )


def describe(folder: str, name: str = "model") -> Config:
    """Returns the folder's config.json as a dictionary. Raises ConfigError, which begins with `name`, if a required file is
    missing."""
    require_folder(folder, name)
    if not (Path(folder) / CONFIG).is_file():
        from heliostat.recipes.pretrained import no_model

        raise ConfigError(f"{name}: {folder!r} {no_model(Path(folder))}")
    config = read_json(folder, CONFIG, name)
    require_files(folder, name)
    return config


def read_json(folder: str, file: str, name: str = "model") -> Config:
    """Reads a JSON mapping from a file of the folder. Raises ConfigError if the file isn't a mapping, or if the model requires
    code in the folder."""
    try:
        config = json.loads(files.read(name, str(Path(folder) / file)))
        fault = "" if isinstance(config, dict) else "isn't a mapping"
    except ValueError as e:
        config, fault = {}, f"isn't JSON ({e})"
    if fault:
        raise ConfigError(f"{name}: {folder!r}: {file} {fault}. Use a folder that save_pretrained has written")
    if "auto_map" in config:
        raise ConfigError(
            f"{name}: {folder!r} needs its own code ({file}: auto_map), which heliostat doesn't run. Use another model"
        )
    return config


def require_files(folder: str, name: str = "model", tokenizer: bool = True) -> None:
    """Raises ConfigError if the folder has no safetensors, or no tokenizer."""
    if not weights(folder):
        raise ConfigError(f"{name}: {folder!r} has no safetensors weights. Save the model with save_pretrained")
    if tokenizer and not (Path(folder) / TOKENIZER).is_file():
        raise ConfigError(f"{name}: {folder!r} has no {TOKENIZER}. Save the fast tokenizer to this folder with save_pretrained")


def weights(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def labels(config: Config) -> list[str]:
    """Lists the labels in the order of the model's outputs."""
    named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return [named[key] for key in sorted(named, key=int)]


def require_label(label: str, config: Config) -> None:
    known = labels(config)
    if label not in known:
        raise ConfigError(f"label: {label!r} isn't a label of the model ({', '.join(known)}){nearest(label, known)}")


def label_scores(logits: Tensor, place: int, config: PretrainedConfig) -> list[float]:
    """Returns the score of the label at index `place` for each text: a probability, or the output of a model with a single label,
    such as a grade."""
    values = logits.float()
    if values.shape[-1] > 1:
        values = values.sigmoid() if config.problem_type == "multi_label_classification" else values.softmax(-1)
    return [round(value, 5) for value in values[:, place].tolist()]


def digests(folder: str) -> dict[str, str]:
    paths = [*weights(folder), Path(folder) / CONFIG, Path(folder) / TOKENIZER]
    return {path.name: files.digest("model", str(path)) for path in paths}


def padded(tokens: int, most: int) -> int:
    """Returns the padded length for `tokens` tokens: a power of two, or 1.5 times a power of two."""
    length = LEAST_TOKENS
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return min(length, max(most, tokens))


def check_length(config: Config, max_tokens: int) -> None:
    """Raises ConfigError if the model can't read `max_tokens` tokens."""
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and max_tokens > most:
        raise ConfigError(f"max_tokens: {max_tokens:,} is above the model's maximum. Set max_tokens to {most:,} or less")


class NamesModel(Stage):
    """Defines the key `model` of a stage: the folder of a model that reads texts. A subclass may accept models for other
    inputs."""

    libraries: ClassVar[tuple[str, ...]] = MODELS
    paths: ClassVar[tuple[str, ...]] = ("model",)

    model: str = Field(min_length=1)
    """Folder of the model, or `ORG/NAME` of the Hugging Face Hub (docs/guides/hub.md). Nodes without the folder get a copy of the
    folder's files, without pickles."""

    def digests(self) -> dict[str, object]:
        return {"model": digests(self.model)}


class ModelStage(NamesModel):
    """Runs documents through the model in a folder, and keeps or drops each document independently of the others."""

    def open(self) -> Work:
        self.check()
        compute = self.computing()
        return lambda documents: [self.outcome(d, *values) for d, values in zip(documents, compute(documents), strict=True)]

    @abstractmethod
    def computing(self) -> Callable[[list[Document]], Sequence[tuple[object, ...]]]:
        """Loads the model, and returns the function that computes the values for `outcome`."""

    @abstractmethod
    def outcome(self, document: Document, *values: Any, **none: Any) -> Outcome:
        """Keeps or drops a document, based on the values that the model computed for this document."""


class ScoringStage(ModelStage):
    """Drops documents if the model in a folder gives them a score that is too low or too high; a subclass computes the
    scores."""

    gpu: ClassVar[bool] = True
    limits: ClassVar = {
        "low_score": ("score", "min_score", "a score below {}"),
        "high_score": ("score", "max_score", "a score above {}"),
    }

    min_score: Float | None = None
    """Minimum score to keep a document (`low_score`)."""
    max_score: Float | None = None
    """Maximum score to keep a document (`high_score`)."""
    column: str = Field("score", min_length=1)
    """Column for the score."""

    @model_validator(mode="after")
    def _one(self) -> ScoringStage:
        if self.min_score is None and self.max_score is None:
            raise ValueError("set min_score, max_score, or both")
        return self

    def outcome(self, document: Document, score: float, cut: bool = False) -> Outcome:
        return self.judged(document, {"score": score}, {"cut_to_max_tokens": 1} if cut else {}, {self.column: score})


class Reader(ABC, Generic[Value]):
    """Runs texts, or pairs of texts, through the model in a folder. Uses a GPU if the machine has one. A subclass defines the
    model and the results. If a pair is longer than `max_tokens`, the second text is truncated."""

    pairs = False

    def __init__(self, folder: str, what: str, max_tokens: int, batch: int, name: str = "model") -> None:
        import torch
        from tokenizers import Tokenizer

        self.batch, self.max_tokens = batch, max_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = Tokenizer.from_file(str(Path(folder) / TOKENIZER))
            model = self.load(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        except Exception as e:  # errors of many kinds, for faulty folders
            fault = str(e).partition("\n")[0]
            raise ConfigError(
                f"{name}: can't load {folder!r} as {what} ({fault}). Use a folder that save_pretrained has written"
            ) from e
        self.model = model.eval().to(self.device)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens, strategy="only_second" if self.pairs else "longest_first")
        self.pad = model.config.pad_token_id or 0
        self.typed = self.pairs and getattr(model.config, "type_vocab_size", 1) > 1

    @abstractmethod
    def load(self, folder: str, **options: object) -> PreTrainedModel:
        """Loads the folder's model, with options for transformers."""

    def __call__(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[tuple[Value, bool]]:
        """Returns for each text or pair: (result, whether the text or pair was longer than `max_tokens`)."""
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
        """Computes a value for each row of a batch from the model's output, the tokens, and their mask."""


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
    """Computes the mean negative log probability of a text's tokens, except the first, in a causal language model. None for a
    text with fewer than two tokens. ConfigError if the result isn't finite."""

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
                raise ConfigError(f"model: {self.folder!r} returns probabilities that aren't finite. Use another model")
            return nats

        lengths = mask.sum(1).tolist()
        return [mean(logits, row, count) for logits, row, count in zip(output.logits, ids, lengths, strict=True)]
