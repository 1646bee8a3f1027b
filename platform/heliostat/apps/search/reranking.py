"""Orders passages by a cross-encoder: a model that reads the question and a passage together, and gives one number for the pair.

It is more exact than embeddings and words, and expensive: a forward pass for each passage. So it reads the first passages that a
search finds, and puts them into its own order.
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
CANDIDATES = 50  # of what a search finds, that are put into the reranker's order
BATCH = 16
TOKENIZER_CONFIG = "tokenizer_config.json"
UNBOUNDED = 1 << 20  # tokens: what a passage never has


def require(folder: Path) -> None:
    """Reads what a folder says of its model; ConfigError if that is no cross-encoder, before any weight is read."""
    config = scoring.describe(str(folder), OPTION)
    named = config.get("architectures") or ["a model that its config.json does not name"]
    if not str(named[0]).endswith(HEAD):
        raise ConfigError(f"{OPTION}: {folder} holds {named[0]}, without a scoring head. Use a model ...{HEAD}")
    labels = scoring.labels(config)
    if len(labels) != 1:
        first = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
        raise ConfigError(f"{OPTION}: {folder} has {len(labels)} labels ({first}). Use a cross-encoder, which has one")


class Pairs(scoring.SequenceClassifier):
    """Runs pairs of texts through a cross-encoder, and returns its logits."""

    pairs = True

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), WHAT, UNBOUNDED, BATCH, OPTION)
        if self.model.config.pad_token_id is None:  # a decoder's head reads the last token that is no padding
            raise ConfigError(f"{OPTION}: {folder}: config.json has no pad_token_id. Set it to a token that no text contains")
        self.max_tokens = room(self.model, folder)
        self.tokenizer.enable_truncation(self.max_tokens, strategy="only_second")

    def values(self, output: SequenceClassifierOutput, ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
        assert output.logits is not None
        return output.logits.float()[:, 0].tolist()


def room(model: PreTrainedModel, folder: Path) -> int:
    """Finds how many tokens of a pair the model takes: by its positions, and by what its tokenizer says."""
    file = folder / TOKENIZER_CONFIG
    try:
        said = json.loads(file.read_text()).get("model_max_length") if file.is_file() else None
    except (ValueError, AttributeError) as e:
        raise ConfigError(f"{OPTION}: {file} is damaged. Save the tokenizer again") from e
    said = said if isinstance(said, int | float) else UNBOUNDED
    return int(min(encoder.places(model.config, model) or UNBOUNDED, said, UNBOUNDED))


class Reranker:
    """Loads a cross-encoder; ConfigError at once if the folder holds none."""

    def __init__(self, folder: Path) -> None:
        require(folder)
        self.folder, self.pairs = folder, Pairs(folder)
        self._lock = threading.Lock()

    def facts(self) -> dict[str, object]:
        """Describes the model: its folder and digest, and how many tokens of a pair it takes."""
        return {"folder": str(self.folder), "digest": model_digest(self.folder), "max_tokens": self.pairs.max_tokens}

    def order(self, question: str, passages: Sequence[Passage]) -> list[Passage]:
        """Returns the passages by falling `rerank_score`, the model's logit; `rerank_cut`: it has read only the beginning of one.

        ConfigError if the question leaves no room for a passage, HeliostatError if a score is not a number.
        """
        with self._lock:  # requests share the model
            self._require_room(question)
            scored = self.pairs([(question, passage["text"]) for passage in passages])
        if any(not math.isfinite(score) for score, _ in scored):
            raise HeliostatError(f"{self.folder}: the reranker returns a score that isn't finite")
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
                f"question: has {needed:,} tokens, but the reranker reads {most:,} including a passage. Ask a shorter one"
            )


def best(index: SearchIndex, reranker: Reranker | None, question: str, mode: str, top: int) -> list[Passage]:
    """Finds at most `top` passages: `score` is that of the search, `scored_by` how it searched, and the order the reranker's
    where there is one."""
    (passages,) = index.search([question], mode, top if reranker is None else max(top, CANDIDATES))
    labeled: list[Passage] = [{**passage, "scored_by": mode} for passage in passages]
    return labeled if reranker is None else reranker.order(question, labeled)[:top]


def reordered(reranker: Reranker, question: str, lists: Iterable[Sequence[Passage]]) -> list[list[Passage]]:
    """Puts the first CANDIDATES of each list into the reranker's order; a passage in several lists is scored once."""
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
