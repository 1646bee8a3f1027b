"""Evaluates an index with questions whose relevant documents are known. Computes recall, nDCG, and MRR of each search mode.

A question has one or more relevant documents. A search ranks passages. A document's rank is the rank of its best passage.
recall@k is the share of the relevant documents that are among the first k documents. nDCG@k sums 1 / log2(1 + rank) over the
relevant documents among the first k, and divides this sum by its best possible value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heliostat.apps.search.reranking import Reranker, reordered
from heliostat.apps.search.search import DEPTH, Passage, SearchIndex, fuse
from heliostat.errors import ConfigError

CUTS = (1, 5, 10)
MEASURES = (*(f"recall@{k}" for k in CUTS), "ndcg@10", "mrr")
Z = 1.96  # half of a 95 % interval, in standard errors
RERANKED = "+reranker"  # suffix of a mode's name if the reranker reorders the mode's passages


def questions(file: Path) -> list[tuple[str, set[str]]]:
    """Reads a `.jsonl` file of questions; returns each question with the ids of its relevant documents. Raises ConfigError,
    which names the first invalid line."""
    try:
        # not splitlines: JSON texts may contain other line separators
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--questions: can't read {file} ({e}). Pass a .jsonl file") from e
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            named = row["document"]
            row["question"].encode()  # JSON can contain lone surrogates, which tokenizers reject
            right = {named} if isinstance(named, str) else set(named)
            if not row["question"].strip() or not right or not all(isinstance(one, str) for one in right):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            form = '{"question": "...", "document": ID or [ID, ...]}'
            raise ConfigError(f"--questions: {file}, line {number}: expected {form}") from e
        pairs.append((row["question"], right))
    if not pairs:
        raise ConfigError(f"--questions: {file} contains no question. Write one question per line")
    return pairs


def judge(index: SearchIndex, questions: Sequence[tuple[str, set[str]]], reranker: Reranker | None = None) -> dict[str, Any]:
    """Computes the measures of each search mode. With a reranker, also computes the measures of each mode in the reranker's
    order.

    `over_bm25`: for each mode, the mean differences from BM25, each with half the width of the 95 % confidence interval.
    `reranked`: for each mode, the mean differences between the reranker's order and the search's order, with the same intervals.
    Questions are left out and counted as `unknown` if the index lacks one of their documents, and as `too_long` if they exceed
    the embedder's maximum. Raises ConfigError if no question is left.
    """
    present = index.holding({document for _, right in questions for document in right})
    known = [(question, right) for question, right in questions if right <= present]
    if not known:
        raise ConfigError(
            f"--questions: {index.place} has none of the documents that the questions name, for example "
            f"{min(questions[0][1])!r}. Write questions about documents of this index"
        )
    unknown, long = len(questions) - len(known), index.too_long([question for question, _ in known])
    known = [(question, right) for question, right in known if question not in long]
    if not known:
        raise ConfigError(
            f"--questions: all questions are too long for the embedder of {index.place}, for example "
            f"{min(long)[:80]!r}. Write shorter questions"
        )
    too_long = len(questions) - unknown - len(known)
    texts = [question for question, _ in known]
    results = {mode: index.search(texts, mode, DEPTH) for mode in index.modes if mode != "hybrid"}
    if "hybrid" in index.modes:
        results["hybrid"] = [fuse(both) for both in zip(results["bm25"], results["dense"], strict=True)]
    plain = list(results)
    if reranker is not None:
        results |= _reranked(reranker, texts, results)
    values = {
        mode: [measures(ranks(passages, right), len(right)) for passages, (_, right) in zip(lists, known, strict=True)]
        for mode, lists in results.items()
    }
    modes = {mode: {name: _mean([one[name] for one in each]) for name in MEASURES} for mode, each in values.items()}
    over = {mode: _differences(each, values["bm25"]) for mode, each in values.items() if mode != "bm25"}
    report = {"questions": len(known), "unknown": unknown, "too_long": too_long, "modes": modes, "over_bm25": over}
    if reranker is None:
        return report
    gained = {mode: _differences(values[mode + RERANKED], values[mode]) for mode in plain}
    return {**report, "reranker": reranker.facts(), "reranked": gained}


def _reranked(
    reranker: Reranker, questions: Sequence[str], results: dict[str, list[list[Passage]]]
) -> dict[str, list[list[Passage]]]:
    """Reorders the results of each mode with the reranker."""
    reranked: dict[str, list[list[Passage]]] = {mode + RERANKED: [] for mode in results}
    for number, question in enumerate(questions):
        ordered = reordered(reranker, question, [lists[number] for lists in results.values()])
        for lists, one in zip(reranked.values(), ordered, strict=True):
            lists.append(one)
    return reranked


def _differences(these: Sequence[dict[str, float]], those: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: _interval([a[name] - b[name] for a, b in zip(these, those, strict=True)]) for name in MEASURES}


def ranks(passages: Sequence[Passage], right: set[str]) -> list[int]:
    """Returns the ranks, from 1, of the relevant documents among the documents of these passages."""
    documents = dict.fromkeys(passage["document"] for passage in passages)
    return [rank for rank, document in enumerate(documents, 1) if document in right]


def measures(ranks: Sequence[int], right: int) -> dict[str, float]:
    """Computes the measures of one question. `ranks`: ranks of its relevant documents; `right`: the number of all relevant
    documents."""
    best = sum(1 / math.log2(1 + rank) for rank in range(1, min(right, 10) + 1))
    return {
        **{f"recall@{k}": sum(rank <= k for rank in ranks) / right for k in CUTS},
        "ndcg@10": sum(1 / math.log2(1 + rank) for rank in ranks if rank <= 10) / best,
        "mrr": max((1 / rank for rank in ranks), default=0.0),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _interval(values: Sequence[float]) -> list[float]:
    """Returns the mean of the values, and half the width of the mean's 95 % confidence interval."""
    mean = _mean(values)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return [mean, Z * spread / math.sqrt(len(values))]
