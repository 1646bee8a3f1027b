"""Reorders passages with a cross-encoder: a model that reads a question and a passage together and returns one score.

A cross-encoder is more accurate than embeddings and BM25 but expensive: each passage costs a forward pass. So the cross-encoder
reads only the first passages of a search's results.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.apps.search.search import Passage, SearchIndex
from heliostat.curation import scoring
from heliostat.errors import ConfigError, HeliostatError
from heliostat.inference.batch.run import model_digest
from heliostat.recipes.text import encoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

OPTION = "--reranker"
HEAD = "ForSequenceClassification"
WHAT = "a cross-encoder"
CANDIDATES = 50  # number of passages per search that the reranker reads and reorders
BATCH = 16
TOKENIZER_CONFIG = "tokenizer_config.json"
UNBOUNDED = 1 << 20  # tokens: more than in any passage


def require(folder: Path) -> None:
    """Raises ConfigError unless the folder's config describes a cross-encoder. Reads no weights."""
    config = scoring.describe(str(folder), OPTION)
    named = config.get("architectures") or ["a model whose config.json has no architectures"]
    if not str(named[0]).endswith(HEAD):
        raise ConfigError(
            f"{OPTION}: {folder} contains {named[0]}, which has no scoring head. Use a model whose class name ends with {HEAD}"
        )
    labels = scoring.labels(config)
    if len(labels) != 1:
        first = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
        raise ConfigError(f"{OPTION}: {folder} has {len(labels)} labels ({first}). Use a cross-encoder, which has one label")


class Pairs(scoring.SequenceClassifier):
    """Computes the cross-encoder's logits for pairs of texts."""

    pairs = True

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), WHAT, UNBOUNDED, BATCH, OPTION)
        if self.model.config.pad_token_id is None:  # a decoder's head reads the last token that isn't padding
            raise ConfigError(f"{OPTION}: {folder}: config.json has no pad_token_id. Set it to a token that no text contains")
        self.max_tokens = room(self.model, folder)
        self.tokenizer.enable_truncation(self.max_tokens, strategy="only_second")

    def values(self, output: SequenceClassifierOutput, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
        assert output.logits is not None
        return output.logits.float()[:, 0].tolist()


def room(model: PreTrainedModel, folder: Path) -> int:
    """Returns the maximum tokens of a pair: the smaller of the model's positions and the tokenizer's `model_max_length`."""
    file = folder / TOKENIZER_CONFIG
    try:
        said = json.loads(file.read_text()).get("model_max_length") if file.is_file() else None
    except (ValueError, AttributeError) as e:
        raise ConfigError(f"{OPTION}: {file} is damaged. Save the tokenizer again") from e
    said = said if isinstance(said, int | float) else UNBOUNDED
    return int(min(encoder.places(model.config, model) or UNBOUNDED, said, UNBOUNDED))


class Reranker:
    """Loads a cross-encoder; raises ConfigError if the folder's model isn't a cross-encoder."""

    def __init__(self, folder: Path) -> None:
        require(folder)
        self.folder, self.pairs = folder, Pairs(folder)
        self._lock = threading.Lock()

    def facts(self) -> dict[str, object]:
        """Describes the model: its folder, its digest, and the maximum tokens of a pair."""
        return {"folder": str(self.folder), "digest": model_digest(self.folder), "max_tokens": self.pairs.max_tokens}

    def order(self, question: str, passages: Sequence[Passage]) -> list[Passage]:
        """Returns the passages sorted by `rerank_score` (the model's logit), best first. `rerank_cut`: whether the model read
        only the beginning of the passage.

        Raises ConfigError if the question is so long that no passage fits into the pair. Raises HeliostatError if a score isn't
        finite.
        """
        with self._lock:  # concurrent requests share the model
            self._require_room(question)
            scored = self.pairs([(question, passage["text"]) for passage in passages])
        if any(not math.isfinite(score) for score, _ in scored):
            raise HeliostatError(f"{self.folder}: the reranker returns a score that isn't finite. Check the model's weights")
        ordered: list[Passage] = [
            {**p, "rerank_score": score, "rerank_cut": cut} for p, (score, cut) in zip(passages, scored, strict=True)
        ]
        return sorted(ordered, key=lambda p: (-p["rerank_score"], p["document"], p["number"]))

    def _require_room(self, question: str) -> None:
        tokenizer, most = self.pairs.tokenizer, self.pairs.max_tokens
        tokenizer.no_truncation()
        needed = len(tokenizer.encode(question, "").ids)
        tokenizer.enable_truncation(most, strategy="only_second")
        if needed >= most:
            raise ConfigError(
                f"question: has {needed:,} tokens, but the reranker reads at most {most:,} tokens for the question and a "
                f"passage together. Ask a shorter question"
            )


def best(index: SearchIndex, reranker: Reranker | None, question: str, mode: str, top: int) -> list[Passage]:
    """Returns at most `top` passages, in the reranker's order if there is a reranker. `score`: the search's score; `scored_by`:
    the search mode."""
    (passages,) = index.search([question], mode, top if reranker is None else max(top, CANDIDATES))
    labeled: list[Passage] = [{**passage, "scored_by": mode} for passage in passages]
    return labeled if reranker is None else reranker.order(question, labeled)[:top]


def reordered(reranker: Reranker, question: str, lists: Iterable[Sequence[Passage]]) -> list[list[Passage]]:
    """Reorders the first CANDIDATES passages of each list with the reranker. Scores a passage only once, even if several lists
    contain it."""
    lists = list(lists)
    heads = [passage for passages in lists for passage in passages[:CANDIDATES]]
    ranked = {_place(p): p for p in reranker.order(question, list({_place(p): p for p in heads}.values()))}
    order = {place: rank for rank, place in enumerate(ranked)}
    return [
        [ranked[place] for place in sorted((_place(p) for p in passages[:CANDIDATES]), key=order.__getitem__)]
        + list(passages[CANDIDATES:])
        for passages in lists
    ]


def _place(passage: Passage) -> tuple[str, str, int]:
    return passage["shard"], passage["document"], passage["number"]
