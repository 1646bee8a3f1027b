"""Drops documents by the score of a Hugging Face sequence classifier, for example of quality, educational value, toxicity, or
domain.

FineWeb-Edu (Penedo et al. 2024, arXiv 2406.17557) keeps documents to which a small BERT gives a grade of at least 3 of 5. DCLM
and Nemotron-CC use other classifiers. `model` is a local folder as `save_pretrained` writes it, with safetensors and
tokenizer.json. heliostat never runs code from this folder. The score is the label's probability (softmax, or sigmoid for
independent labels). If a model has only one label, the score is the model's output. The model reads only the first `max_tokens`
tokens of a document; the stage counts the longer documents. If the cluster has GPUs, each GPU has an actor with the model;
otherwise the stage runs on CPUs. Scores don't depend on the batch, but their last digits differ between devices.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from heliostat.curation import scoring
from heliostat.curation.stage import Document, text_of


class HfClassifier(scoring.ScoringStage):
    label: str = Field(min_length=1)
    """Label whose score is used, by its name in config.json (`LABEL_0` if config.json has no names)."""
    max_tokens: int = Field(512, ge=8)
    """Maximum tokens of a document that the model reads."""
    batch: int = Field(8, ge=1, le=1024)
    """Batch size: documents of similar length that the model reads together."""

    def check(self) -> None:
        config = scoring.describe(self.model)
        scoring.require_label(self.label, config)
        scoring.check_length(config, self.max_tokens)

    def computing(self) -> Callable[[list[Document]], list[tuple[float, bool]]]:
        scorer = scoring.Scorer(self.model, self.label, self.max_tokens, self.batch)
        return lambda documents: scorer([text_of(d) for d in documents])
