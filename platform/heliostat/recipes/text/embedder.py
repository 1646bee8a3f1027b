"""Trains an embedder of texts contrastively, on pairs of texts that belong together.

    recipe: heliostat.recipes:Embedder
    model: {arch: bert, hidden_size: 256, ..., pooling: mean, temperature: 0.05, max_tokens: 256}
    model: {pretrained: /models/bge-small, ...}        # weights and tokenizer of a folder in Hugging Face's format

A sample is a row with a `query` and a `text` (`heliostat.pipelines:PairPipeline`). All other pairs of a step are its negatives,
on whichever worker they are (`CouplesSamples`), but for those that share its query or its text (`contrastive`).

Held-out scores: the loss of all held-out pairs against each other, recall at 1, 5 and 10, and the mean reciprocal rank.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from pydantic import Field, ValidationError

from heliostat.config.schema import Float, Strict, explain
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.recipes.protocol import Batch, CouplesSamples, Evaluates, Exports, Loss, Part
from heliostat.recipes.text import initial

if TYPE_CHECKING:
    import torch

SIDES = ("query", "text")  # columns of a row


class EmbedderKeys(Strict):
    """Defines the keys of `model` beside those of its architecture."""

    pooling: Literal["mean", "last", "cls"] = "mean"
    """Makes one vector of a text's states: their mean, the last token's, or the first's."""
    temperature: Float = Field(0.05, gt=0)
    """Divides the cosines of the pairs in the loss."""
    max_tokens: int = Field(256, ge=2)
    """Tokens of a text that are seen."""


OWN = tuple(EmbedderKeys.model_fields)


def _keys(model: dict[str, Any]) -> EmbedderKeys:
    """Reads the keys among a job's `model`; ConfigError for wrong values."""
    try:
        return EmbedderKeys.model_validate({k: v for k, v in model.items() if k in OWN})
    except ValidationError as e:
        raise ConfigError("\n  ".join(f"model.{line}" for line in explain(e, EmbedderKeys))) from e


class Embedder(CouplesSamples, Evaluates, Exports):
    kind = "rows"
    scores = ("loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr")
    gathered = ("query", "text", "names")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: rows have none; remove it, and set model.max_tokens")
        if job.train.global_batch < 2:
            raise ConfigError("train.global_batch: 1 pair has no other to be told from; give 2 or more")
        self.keys = _keys(job.model)
        self.pretrained = job.model.get("pretrained")
        if initial.KEY in job.model:
            raise ConfigError(f"model.{initial.KEY}: is of language models; remove it")

    @cached_property
    def config(self) -> Any:
        """Makes the model's configuration, which needs transformers; ConfigError for keys that make no sense."""
        from heliostat.recipes.text import model_config, overrides
        from heliostat.recipes.text.encoder import ENCODER

        given = {k: v for k, v in self.job.model.items() if k not in OWN}
        if self.pretrained:
            config = overrides.applied(model_config.read(given, ENCODER), model_config.changed(given))
        else:
            config = model_config.from_keys(given, ENCODER)
        longest = getattr(config, "max_position_embeddings", None)
        if longest and 0 < longest < self.keys.max_tokens:
            raise ConfigError(
                f"model.max_tokens: {self.keys.max_tokens} is longer than the model's max_position_embeddings {longest}"
            )
        config.use_cache = False
        return config

    def probe(self) -> None:
        assert self.config

    def bind(self, sources: list[Manifest]) -> None:
        self.sources = sources
        if self.pretrained:
            return
        if len({source.meta.get("tokenizer") for source in sources}) > 1:
            raise ConfigError("data.sources: the datasets were made with different tokenizers; prepare them with one")
        if "tokenizer" not in sources[0].meta:
            raise ConfigError(f"data.sources: {sources[0].location} has no tokenizer, and the model none of its own; give the "
                              "pipeline a `tokenizer`, or take model.pretrained")  # fmt: skip
        size, given = len(self.tokenizer), self.job.model.get("vocab_size")
        if given is not None and given < size:
            raise ConfigError(f"model.vocab_size: {given} is below the tokenizer's {size}")
        self.config.vocab_size = given or -(-size // 64) * 64  # a multiple that matrix units like
        self.config.pad_token_id = self.tokenizer.pad_token_id
        self.config.bos_token_id = self.config.eos_token_id = self.tokenizer.eos_token_id

    @cached_property
    def tokenizer(self) -> Any:
        """Loads the pretrained model's tokenizer, or that of the datasets, which puts the end of a document behind each text."""
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        from heliostat.recipes.pretrained import from_folder

        if self.pretrained:
            found = from_folder("model.pretrained", AutoTokenizer, self.pretrained)
            if found.pad_token_id is None:
                found.pad_token = found.eos_token
            return found
        raw, end = self._raw_tokenizer()
        return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, pad_token=end, model_max_length=self.keys.max_tokens)

    def _raw_tokenizer(self) -> tuple[Any, str]:
        from tokenizers import Tokenizer, processors

        made = self.sources[0].file("tokenizer.json")
        try:
            definition = made.read()
        except FileNotFoundError as e:
            raise DataError(f"{made}: is not there; prepare the dataset again") from e
        if hashlib.sha256(definition).hexdigest() != self.sources[0].fact("tokenizer"):
            raise ConfigError(f"{made}: is not the tokenizer of the dataset")
        raw, number = Tokenizer.from_str(definition.decode()), self.sources[0].fact("end_of_document")
        if (end := raw.id_to_token(number)) is None:
            raise ConfigError(f"{made}: has no token {number}, which ends documents there; prepare the dataset again")
        raw.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, number)])
        return raw, end

    def build(self) -> torch.nn.Module:
        import torch

        from heliostat.recipes.text import checkpointing, encoder

        if self.pretrained and torch.get_default_device().type != "meta":
            model = encoder.load("model.pretrained", self.pretrained, config=self.config, dtype=torch.float32)
        else:
            model = encoder.build(self.config)
        if self.job.train.activation_checkpointing:
            checkpointing.use(model, True, False)
        return model.train()

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: Any, keys: np.ndarray) -> Batch:
        import torch

        made: Batch = {}
        columns = {side: [text or "" for text in content[side].to_pylist()] for side in SIDES}  # a bad held-out row has None
        cut = np.zeros((len(keys), len(SIDES)), dtype=np.int64)
        for number, side in enumerate(SIDES):
            made |= self._side(side, columns[side], cut[:, number])
        names = [[_name(text) for text in columns[side]] for side in SIDES]
        return {**made, "names": torch.tensor(names).T.contiguous(), "cut": torch.from_numpy(cut)}

    def _side(self, side: str, texts: list[str], cut: np.ndarray) -> Batch:
        """Makes the tokens of one side's texts, and marks in `cut` those of which not all are seen."""
        from heliostat.recipes.batches import pad

        longest, fill = self.keys.max_tokens, self.tokenizer.pad_token_id
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        cut[:] = [len(row) > longest for row in whole]
        rows = self.tokenizer(texts, truncation=True, max_length=longest)["input_ids"] if cut.any() else whole
        padded = pad([row or [fill] for row in rows], fill, longest)
        return {f"{side}_ids": padded.values, f"{side}_mask": padded.mask.long()}

    def represent(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        from heliostat.recipes.text.encoder import embed

        sides = {side: embed(model, batch[f"{side}_ids"], batch[f"{side}_mask"], self.keys.pooling) for side in SIDES}
        return {**sides, "names": batch["names"], "cut": batch["cut"]}

    def couple(self, found: dict[str, torch.Tensor]) -> Loss:
        from heliostat.recipes.text.contrastive import contrast

        made = contrast(found["query"], found["text"], found["names"], self.keys.temperature)
        parts = {"accuracy": made.right / len(found["names"]), "masked": made.masked, "cut": found["cut"].float().mean()}
        return Loss(made.loss, {name: Part(value) for name, value in parts.items()})

    # scores ----------------------------------------------------------------------------------------------------------

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        found = self.represent(model, batch)
        return {name: found[name] for name in self.gathered}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        import torch

        from heliostat.recipes.text import contrastive

        query, text, names = (torch.from_numpy(arrays[name]) for name in self.gathered)
        loss = float(contrastive.contrast(query, text, names, self.keys.temperature).loss) / len(names)
        return {"loss": loss, **contrastive.recall(contrastive.ranks(*(arrays[name] for name in self.gathered)))}

    # for people, and the export --------------------------------------------------------------------------------------

    def describe(self, content: Any) -> str:
        row = content.to_pylist()[0]
        return f"{row['query']} -> {row['text']}"

    def save_config(self, folder: Path) -> None:
        from heliostat.recipes.text import encoder, sentence_folder

        config = type(self.config).from_dict(self.config.to_dict())
        config.architectures = [encoder.model_class(config).__name__]
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        how = sentence_folder.Embedding(self.keys.pooling, self.keys.max_tokens)
        sentence_folder.write(folder, how, config.get_text_config().hidden_size)

    def load(self, folder: Path) -> torch.nn.Module:
        from heliostat.recipes.text import encoder

        return encoder.load("model", folder)

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
        return {"pretrained": str(folder), **{key: model[key] for key in OWN if key in model}}


def _name(text: str) -> int:
    """Returns a number by which equal texts are known."""
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass")) - (1 << 63)
