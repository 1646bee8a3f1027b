"""Trains a language model on preferences: DPO, conservative DPO, and IPO (`preference_loss`).

    recipe: heliostat.recipes:DPO
    model: {pretrained: models/assistant, dpo: {beta: 0.1}}                           # the dataset has the reference's values
    model: {pretrained: models/assistant, adapter: {rank: 16}, dpo: {beta: 0.1}}      # the reference is the base

A sample is a row with a prompt, a chosen answer, and a rejected answer (`heliostat.pipelines:PreferencePipeline`). The loss compares
how much more probable each answer is under the model than under a frozen reference. The reference's log-probabilities are in the
dataset (`heliostat.pipelines:ReferencePipeline`), or come from the model with its adapter off.

Held-out scores: loss, accuracy (the share of pairs with a positive margin), and margin.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from heliostat.config.spec import Job
from heliostat.data import conversations
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes import adapters
from heliostat.recipes.folder_digests import weights_digest
from heliostat.recipes.protocol import Batch, Evaluates, Loss, Part
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.schema import Float, Strict, validate
from heliostat.storage.hub import files

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from heliostat.recipes.text.preference_loss import ComparedAnswers
BUILT_IN = {"DPO": ("heliostat.recipes.text.answer_logprobs", "transformers")}
KEY, ANY = "dpo", "any"
PIPELINE = "heliostat.pipelines:ReferencePipeline"


class DPOKeys(Strict):
    """Defines the keys of `model.dpo`."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """`sigmoid`: DPO. `ipo`: a squared loss of the mean log-probabilities per token, which stops at a finite margin."""
    beta: Float = Field(0.1, gt=0)
    """Strength of the reference: a larger value keeps the model closer to the reference."""
    label_smoothing: Float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose answers are swapped (conservative DPO). Only for `sigmoid`."""
    reference: Literal["dataset", "base"] | None = None
    """`dataset`: the dataset's log-probabilities. `base`: the model with its adapter off, which takes a second forward pass. Unset:
    `dataset` if all datasets have log-probabilities, else `base`."""
    reference_model: str | None = None
    """Digest of the reference, if the dataset's log-probabilities come from another model than `model.pretrained` on purpose. `any`:
    not checked."""

    @model_validator(mode="after")
    def _smooths_probabilities(self) -> DPOKeys:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) is only for loss: sigmoid. Remove it, or set loss to sigmoid"
            )
        return self


class DPO(CausalLM):
    kind = "rows"
    terms_per_sample = 1
    scores = ("loss", "accuracy", "margin")

    def __init__(self, job: Job) -> None:
        self.keys = validate(DPOKeys, job.model.get(KEY, {}), f"model.{KEY}")
        model = {key: value for key, value in job.model.items() if key != KEY}
        if "pretrained" not in model:
            raise ConfigError("model.pretrained: required for DPO. Set this key to the folder of a fine-tuned model")
        data = job.data.model_copy(update={"sequence_length": 64})
        super().__init__(job.model_copy(update={"model": model, "data": data}))
        self.document_mask = False  # a sequence is one conversation
        if self.keys.reference == "base" and not self.adapter:
            raise ConfigError(f"model.{KEY}.reference: base needs an adapter to switch off. {self._fixes}")

    @property
    def _fixes(self) -> str:
        return f"Set model.adapter, or add log-probabilities to the dataset with {PIPELINE}"

    def probe(self) -> None:
        super().probe()
        dropout = {name: value for name, value in self.config.to_dict().items() if "drop" in name and isinstance(value, float)}
        for name in (name for name, value in dropout.items() if value):
            raise ConfigError(f"model.{name}: dropout ({dropout[name]}) would add noise to the log-probabilities. Set it to 0.0")
        if self.routes:
            raise ConfigError(
                f"model.pretrained: DPO doesn't support mixtures of experts ({self.config.model_type!r}), because padding would be "
                "routed too. Use a dense model"
            )

    def require_cut(self, parts: int) -> None:
        raise ConfigError(
            f"train.parallel.sequence: not supported for DPO, because a pair's loss needs complete answers ({parts}). Set it to 1"
        )

    def require_matrices_divided(self, parts: int) -> None:
        raise ConfigError(
            f"train.parallel.tensor: not supported for DPO, because heliostat hasn't tested it ({parts}). Set it to 1"
        )

    def small(self, config: Any, length: int, end: int) -> CausalLM:
        """Returns a recipe of next-token prediction, because checks of an architecture need no pairs."""
        model = copy.copy(self)
        model.__class__ = CausalLM  # type: ignore[assignment]
        return model.small(config, length, end)

    # datasets ----------------------------------------------------------------------------------------------------------

    def bind(self, sources: list[Manifest]) -> None:
        for i, source in enumerate(sources):
            facts = source.meta.get(conversations.FACT)
            if not facts or facts["form"] != "preferences":
                raise ConfigError(
                    f"data.sources.{i}.path: expected a dataset of preferences, got {facts['form'] if facts else 'other rows'} "
                    f"({source.location}). Prepare one with heliostat.pipelines:PreferencePipeline"
                )
        self.length = max(source.meta[conversations.FACT]["sequence_length"] for source in sources)
        if "config" in vars(self):
            self._require_positions(getattr(self.config, "max_position_embeddings", None))
        self.references = [source.meta[conversations.FACT].get("reference") for source in sources]
        super().bind(sources)
        self._check_reference()

    @property
    def from_dataset(self) -> bool:
        """Returns whether the reference's log-probabilities come from the dataset."""
        if self.keys.reference:
            return self.keys.reference == "dataset"
        return all(self.references) or not self.adapter

    def _check_reference(self) -> None:
        """Raises ConfigError unless all datasets have the log-probabilities of the right reference, if the job needs these."""
        if not self.from_dataset:
            return
        for i, (source, reference) in enumerate(zip(self.sources, self.references, strict=True)):
            place = f"data.sources.{i}.path: {str(source.location)!r}"
            if reference is None:
                raise ConfigError(f"{place} has no log-probabilities of a reference. {self._fixes}")
            right = self.keys.reference_model or weights_digest(Path(self.pretrained))
            if right not in (reference["digest"], ANY):
                whose = (
                    f"model.{KEY}.reference_model"
                    if self.keys.reference_model
                    else f"model.pretrained {files.shown(Path(self.pretrained))!r}"
                )
                raise ConfigError(
                    f"{place} has log-probabilities of another reference ({reference['digest']}) than {whose} ({right}). Run "
                    f"`heliostat data prepare` with {PIPELINE} and the right model, or set model.{KEY}.reference_model: "
                    f"{reference['digest']}"
                )

    def presume(self, rows: int) -> pa.Table:
        """Returns rows of the maximum length, which need the most memory."""
        import pyarrow as pa

        answer = self.length - 1
        row = {"id": "", "prompt": [0], "chosen": [0] * answer, "rejected": [1] * answer}
        return pa.Table.from_pylist([row | dict.fromkeys(conversations.REFERENCE_COLUMNS, 0.0)] * rows, conversations.REFERENCE)

    # training ----------------------------------------------------------------------------------------------------------

    def batch(self, content: pa.Table, keys: np.ndarray | None = None) -> Batch:
        from heliostat.recipes.text import preference_rows

        return preference_rows.batch(content, self.length, self.from_dataset)

    def compared(self, model: torch.nn.Module, batch: Batch) -> ComparedAnswers:
        """Computes the log-probabilities of a batch's answers under the model and its reference."""
        import torch

        from heliostat.recipes.text import preference_loss, preference_rows
        from heliostat.recipes.text.answer_logprobs import answer_logprobs

        tokens, labels, last = batch["input_ids"].flatten(0, 1), batch["labels"].flatten(0, 1), preference_rows.last(batch)

        def logprobs() -> torch.Tensor:
            return answer_logprobs(model, tokens, labels, last, self.tiled).view(-1, 2)

        if "reference" in batch:
            reference = batch["reference"]
        else:
            with torch.no_grad(), adapters.switched_off(model):
                reference = logprobs()
        return preference_loss.ComparedAnswers(logprobs(), reference, (batch["labels"] >= 0).sum(-1))

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        from heliostat.recipes.text import preference_loss

        answers = self.compared(model, batch)
        parts = {name: Part(values.mean()) for name, values in preference_loss.measures(answers, self.keys.beta).items()}
        return Loss(self._losses(answers).sum().float(), parts)

    def _losses(self, answers: ComparedAnswers) -> torch.Tensor:
        from heliostat.recipes.text import preference_loss

        return preference_loss.losses(answers, self.keys.loss, self.keys.beta, self.keys.label_smoothing)

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        import torch

        from heliostat.recipes.text import preference_loss

        answers = self.compared(model, batch)
        measures, losses = preference_loss.measures(answers, self.keys.beta), self._losses(answers)
        return {"loss": losses, "terms": torch.ones_like(losses), **{name: measures[name] for name in self.scores[1:]}}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return Evaluates.metrics(self, sums)

    def flops_per_sample(self, model: torch.nn.Module) -> float:
        """Counts the FLOPs of a pair of the maximum length: both sequences, and their forward passes under the base."""
        passes = 2 if self.from_dataset else 2 * 4 / 3
        return passes * super().flops_per_sample(model)

    # for people ---------------------------------------------------------------------------------------------------------

    def describe(self, content: pa.Table) -> str:
        row = content.to_pylist()[0]
        texts = (self._raw_tokenizer.decode(row[name], skip_special_tokens=False) for name in ("prompt", "chosen", "rejected"))
        return "{}\n--- chosen\n{}\n--- rejected\n{}".format(*texts)

    # the export ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, object]:
        """Returns the `job.model` for an evaluation of the export, against the reference of the evaluation's dataset."""
        return {"pretrained": str(folder), KEY: {**model.get(KEY, {}), "reference": "dataset", "reference_model": ANY}}
