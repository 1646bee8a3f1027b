"""Drops documents by the score of a Hugging Face sequence classifier, for example for quality, education, toxicity, or a
domain.

(FineWeb-Edu: Penedo et al. 2024, arXiv 2406.17557, keeps what a small BERT grades 3 of 5 or more; DCLM and Nemotron-CC have
their own.) `model` is a local folder in the form of save_pretrained, with safetensors and tokenizer.json; heliostat never runs
its code. The score is the label's probability (softmax, or sigmoid for independent labels), or the output of a model with one
label. The model reads only the first `max_tokens` of a document; a count reports longer ones. If the cluster has GPUs, each
has an actor that keeps the model; otherwise CPUs compute. Scores don't depend on the batch, but differ in the last digits
between devices.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from heliostat.curation import scoring
from heliostat.curation.stage import Document, text_of


class HfClassifier(scoring.ScoringStage):
    label: str = Field(min_length=1)
    """Label whose score counts, by its name in config.json (`LABEL_0` if it has none)."""
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
