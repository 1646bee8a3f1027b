"""Trains a language model on preferences: DPO, conservative DPO, and IPO (`preference_loss`).

    recipe: heliostat.recipes:DPO
    model: {pretrained: models/assistant}                           # the dataset has the reference's log-probabilities
    model: {pretrained: models/assistant, adapter: {rank: 16}}      # the reference is the model with its adapter off
    model: {..., dpo: {loss: ipo, beta: 0.1}}

A sample is a row with a prompt, a chosen answer, and a rejected answer (`heliostat.pipelines:PreferencePipeline`). The loss
compares how much more probable each answer is under the model than under a frozen reference. The reference's log-probabilities
are in the dataset (`heliostat.pipelines:ReferencePipeline`), or come from the model with its adapter off.

Held-out scores: loss, accuracy (the share of pairs with a positive margin), and margin.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from heliostat.config.spec import Job
from heliostat.data.conversations import Reference
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes import adapters
from heliostat.recipes.auditing import ChecksFirstStep
from heliostat.recipes.folder_digests import weights_digest
from heliostat.recipes.protocol import Batch, Evaluates, Loss, Part
from heliostat.recipes.text import reference_check
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.conversations import ConversationKeys, LearnsConversations
from heliostat.recipes.text.reference_check import ComparedModel
from heliostat.schema import Float, Strict
from heliostat.storage.hub import files

if TYPE_CHECKING:
    import torch

    from heliostat.recipes.text.answers import TokenPrompt
    from heliostat.recipes.text.preference_loss import ComparedAnswers
BUILT_IN = {"DPO": ("heliostat.recipes.text.answer_logprobs", "transformers")}
ANY = "any"
PIPELINE = "heliostat.pipelines:ReferencePipeline"
log = logging.getLogger(__name__)
FIXES = f"Set model.adapter, or add log-probabilities to the dataset with {PIPELINE}"


class DPOSettings(Strict):
    """Defines the keys of `model.dpo`."""

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """`sigmoid`: DPO. `ipo`: a squared loss of the mean log-probabilities per token, which stops at a finite margin."""
    beta: Float = Field(default=0.1, gt=0)
    """Strength of the reference: a larger value keeps the model closer to the reference."""
    label_smoothing: Float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose answers are swapped (conservative DPO). Only for `sigmoid`."""
    reference: Literal["dataset", "base"] | None = None
    """`dataset`: the dataset's log-probabilities. `base`: the model with its adapter off, which takes a second forward pass.
    Unset: `dataset` if all datasets have log-probabilities, else `base`."""
    reference_model: str | None = None
    """Digest of the reference, if the dataset's log-probabilities come from another model than `model.pretrained` on purpose.
    `any`: not checked."""

    @field_validator("loss", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if value == "dpo":  # the most similar name is ipo, which is another loss
            raise ValueError("'dpo' isn't a choice. Did you mean 'sigmoid', the loss of DPO?")
        return value

    @model_validator(mode="after")
    def _smooths_probabilities(self) -> DPOSettings:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) is only for loss: sigmoid. Remove it, or set loss to sigmoid"
            )
        return self


class DPOKeys(ConversationKeys):
    dpo: DPOSettings = DPOSettings()
    """Loss and reference of DPO."""


class DPO(LearnsConversations, ChecksFirstStep):
    form = "preferences"
    pipeline = "heliostat.pipelines:PreferencePipeline"
    own = DPOKeys
    keys: DPOKeys
    scores = ("loss", "accuracy", "margin")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.settings, self.terms_per_sample = self.keys.dpo, 1
        if not self.pretrained:
            raise ConfigError("model.pretrained: required for DPO. Set this key to the folder of a fine-tuned model")
        if self.document_mask:
            raise ConfigError("data.document_mask: only for packs, and DPO's sequences contain one conversation. Remove this key")
        if self.settings.reference == "base" and not self.adapter:
            raise ConfigError(f"model.dpo.reference: base needs an adapter to switch off. {FIXES}")

    def probe(self) -> None:
        super().probe()
        for name, value in self.config.to_dict().items():
            if "drop" in name and isinstance(value, float) and value:
                raise ConfigError(f"model.{name}: dropout ({value}) would add noise to the log-probabilities. Set it to 0.0")
        if self.routes:
            raise ConfigError(
                f"model.pretrained: DPO doesn't support mixtures of experts ({self.config.model_type!r}), because padding would "
                "be routed too. Use a dense model"
            )

    def require_cut(self, parts: int) -> None:
        raise ConfigError(
            f"train.parallel.sequence: not supported for DPO, because a pair's loss needs complete answers ({parts}). Set it to 1"
        )

    def require_matrices_divided(self, parts: int) -> None:
        raise ConfigError(
            f"train.parallel.tensor: not supported for DPO, because it is untested ({parts}). Use train.zero.stage: 3"
        )

    def small(self, config: Any, length: int, end: int) -> CausalLM:
        """Returns a recipe of next-token prediction, because checks of an architecture need no pairs."""
        plain_recipe = copy.copy(self)
        plain_recipe.__class__ = CausalLM  # type: ignore[assignment]
        return plain_recipe.small(config, length, end)

    # the reference -----------------------------------------------------------------------------------------------------

    def bind(self, sources: list[Manifest]) -> None:
        super().bind(sources)
        if not self.from_dataset:
            return
        for number, (source, reference) in enumerate(zip(sources, self._references, strict=True)):
            self._require_reference(f"data.sources.{number}.path: {str(source.location)!r}", reference)

    @property
    def _references(self) -> list[Reference | None]:
        return [facts["reference"] for facts in self.facts]

    @property
    def from_dataset(self) -> bool:
        """Returns whether the reference's log-probabilities come from the dataset."""
        if self.settings.reference:
            return self.settings.reference == "dataset"
        return all(self._references) or not self.adapter

    def _require_reference(self, dataset: str, reference: Reference | None) -> None:
        """Raises ConfigError unless a dataset has the log-probabilities of the right reference."""
        if reference is None:
            raise ConfigError(f"{dataset} has no log-probabilities of a reference. {FIXES}")
        folder, accepted = Path(str(self.pretrained)), self.settings.reference_model
        right = accepted or weights_digest(folder)
        if right not in (reference["digest"], ANY):
            wanted = "model.dpo.reference_model" if accepted else f"model.pretrained {files.shown(folder)!r}"
            raise ConfigError(
                f"{dataset} has log-probabilities of another reference ({reference['digest']}) than {wanted} ({right}). Run "
                f"`heliostat data prepare` with {PIPELINE} and the right model, or set model.dpo.reference_model: "
                f"{reference['digest']}"
            )
        self._warn_of_precision(dataset, reference["precision"])

    def _warn_of_precision(self, dataset: str, computed: str) -> None:
        """Logs a warning if a dataset's log-probabilities were computed in another precision than that of training."""
        trained = self.job.train.precision
        nearest = "bf16" if trained == "bf16" else "fp32"
        if computed != nearest and self.settings.reference_model != ANY:
            log.warning(
                "%s has log-probabilities in %s, but train.precision is %s, so rounding adds noise to the margins. Run "
                "`heliostat data prepare` with %s and precision: %s", dataset, computed, trained, PIPELINE, nearest,
            )  # fmt: skip

    def check_first_step(self, parts: dict[str, float]) -> None:
        """Raises ConfigError unless the model is its reference at the first step. Doesn't check a reference that the job accepts
        although it is another model."""
        if self.settings.reference_model:
            return
        ratios = {side: parts[f"{side}_reward"] / self.settings.beta for side in ("chosen", "rejected")}
        in_4_bits = self.adapter is not None and self.adapter.base is not None
        precision = "nf4" if in_4_bits else "fp8" if self.fp8 else self.job.train.precision
        references = [reference for reference in self._references if reference] if self.from_dataset else []
        precisions = [precision, *(reference["precision"] for reference in references)]
        limit = reference_check.bound(precisions, self.length - 1, self.job.train.global_batch_size)
        if max(map(abs, ratios.values())) <= limit:
            return
        folder = Path(str(self.pretrained))
        policy = ComparedModel(f"model.pretrained {files.shown(folder)!r}", weights_digest(folder), precision)
        shown = [
            ComparedModel(f"that of {str(source.location)!r}", reference["digest"], reference["precision"])
            for source, reference in zip(self.sources[: len(references)], references, strict=True)
        ] or [replace(policy, name="the model with its adapter off")]
        accepted = references[0]["digest"] if len(references) == 1 else ANY
        fix = f"Run `heliostat data prepare` with {PIPELINE} again, or set model.dpo.reference_model: {accepted}"
        fix = fix if self.from_dataset else "Set model.dpo.reference: dataset"
        raise ConfigError(f"model.dpo.reference: {reference_check.message(policy, shown, ratios, limit)}. {fix}")

    # training ----------------------------------------------------------------------------------------------------------

    def presume(self, rows: int) -> pa.Table:
        from heliostat.recipes.text import preference_rows

        return preference_rows.placeholder(rows, self.length)

    def rows(self, content: pa.Table) -> Batch:
        from heliostat.recipes.text import preference_rows

        vocabulary, fixed = self.sources[0].fact("vocab_size"), bool(self.job.train.compile)
        return preference_rows.batch(content, self.length, vocabulary, self.from_dataset, fixed)

    def compared(self, model: torch.nn.Module, batch: Batch) -> ComparedAnswers:
        """Computes the log-probabilities of a batch's answers under the model and its reference."""
        import torch

        from heliostat.recipes.text import preference_loss
        from heliostat.recipes.text.answer_logprobs import of_pairs

        if "reference" in batch:
            reference = batch["reference"]
        else:
            with torch.no_grad(), adapters.switched_off(model):
                reference = of_pairs(model, batch, self.tiled)
        return preference_loss.ComparedAnswers(of_pairs(model, batch, self.tiled), reference, (batch["labels"] >= 0).sum(-1))

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        from heliostat.recipes.text import preference_loss

        answers = self.compared(model, batch)
        parts = {name: Part(values.mean()) for name, values in preference_loss.measures(answers, self.settings.beta).items()}
        return Loss(self._losses(answers).sum().float(), parts)

    def _losses(self, answers: ComparedAnswers) -> torch.Tensor:
        from heliostat.recipes.text import preference_loss

        return preference_loss.losses(answers, self.settings.loss, self.settings.beta, self.settings.label_smoothing)

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        import torch

        from heliostat.recipes.text import preference_loss

        answers = self.compared(model, batch)
        measures, losses = preference_loss.measures(answers, self.settings.beta), self._losses(answers)
        return {"loss": losses, "terms": torch.ones_like(losses), **{name: measures[name] for name in self.scores[1:]}}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return Evaluates.metrics(self, sums)

    def flops_per_sample(self, model: torch.nn.Module) -> float:
        """Counts the FLOPs of a pair of the maximum length: both sequences, and their forward passes under the base."""
        passes = 2 if self.from_dataset else 2 * 4 / 3
        return passes * super().flops_per_sample(model)

    # for people, and the export ------------------------------------------------------------------------------------------

    def prompts_of(self, content: pa.Table) -> Iterator[TokenPrompt]:
        from heliostat.recipes.text.answers import TokenPrompt

        for row in content.select(["prompt", "chosen"]).to_pylist():
            yield TokenPrompt(row["prompt"], row["chosen"])

    def describe(self, content: pa.Table) -> str:
        row = content.to_pylist()[0]
        texts = (self.raw_tokenizer.decode(row[name], skip_special_tokens=False) for name in ("prompt", "chosen", "rejected"))
        return "{}\n--- chosen\n{}\n--- rejected\n{}".format(*texts)

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, object]:
        """Returns the `job.model` for an evaluation of the export, against the reference of the evaluation's dataset."""
        return {"pretrained": str(folder), "dpo": {**model.get("dpo", {}), "reference": "dataset", "reference_model": ANY}}
