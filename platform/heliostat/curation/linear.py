"""Implements a linear classifier on hashed word n-grams: computes the features, trains the classifier, and stores it in a
folder of safetensors and JSON.

A text's score is the mean weight of its n-grams, like in fastText (Joulin et al. 2016, arXiv 1607.01759), but with a single
weight per n-gram.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from heliostat.errors import ConfigError

_WORD = re.compile(r"[^\W_]+|[^\w\s]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
MOST_WORDS, LONG_WORD = 1 << 20, 64  # maximum cached words, and characters of a word that isn't cached
ABOUT, WEIGHTS = "classifier.json", "weights.safetensors"


class ThresholdScores(TypedDict):
    """Holds the precision and recall of a score threshold on held-out documents. `precision` is None if no document reaches the
    threshold."""

    precision: float | None
    recall: float


class TrainingReport(TypedDict):
    """Reports a classifier's training: counts of examples, scores by threshold (`held_out`), and unreadable documents by reason
    (`left_out`)."""

    held_out: dict[str, ThresholdScores]
    trained_good: int
    trained_bad: int
    held_out_good: int
    held_out_bad: int
    left_out: NotRequired[dict[str, int]]


class NgramCounter:
    """Maps the word n-grams of a text, up to `ngrams` words long, to hash buckets. There are 2 to the power of `bits` buckets."""

    def __init__(self, ngrams: int, bits: int, chars: int) -> None:
        self.ngrams, self.bits, self.chars = ngrams, bits, chars
        self._known: dict[str, int] = {}

    def _word(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        if len(word) <= LONG_WORD:
            self._known[word] = number
        return number

    def __call__(self, text: str) -> np.ndarray:
        """Returns the bucket of each n-gram in the first `chars` characters of a text, int64 [n-grams]."""
        if len(self._known) > MOST_WORDS:
            self._known.clear()
        known, shift = self._known, np.uint64(64 - self.bits)
        words = np.array(
            [known[w] if w in known else self._word(w) for w in _WORD.findall(text[: self.chars].lower())], np.uint64
        )
        grams, out = words, [words * _FACTOR >> shift]
        for n in range(1, self.ngrams):
            if len(words) <= n:
                break
            grams = (grams[:-1] ^ grams[:-1] >> np.uint64(31)) * _FACTOR + words[n:]
            out.append(grams * _FACTOR >> shift)
        return np.concatenate(out).astype(np.int64)


class LinearScorer:
    def __init__(self, weights: np.ndarray, bias: float, features: NgramCounter) -> None:
        self.weights, self.bias, self.features = weights, bias, features

    def score(self, text: str) -> float:
        """Returns the probability (0 to 1) that a text is like the good examples. For an empty text, this is the share of good
        examples."""
        buckets = self.features(text)
        logit = self.bias + (float(self.weights[buckets].mean(dtype=np.float64)) if len(buckets) else 0.0)
        return 1 / (1 + float(np.exp(-np.clip(logit, -500, 500))))

    def save(self, folder: Path, report: Mapping[str, object]) -> None:
        """Writes the classifier to a folder: the weights, the settings, and the training report."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weights": self.weights}, str(folder / WEIGHTS))
        keys = {"ngrams": self.features.ngrams, "bits": self.features.bits, "chars": self.features.chars, "bias": self.bias}
        (folder / ABOUT).write_text(json.dumps({"format": 1, **keys, **report}, indent=1) + "\n")


def load(folder: Path) -> LinearScorer:
    """Loads a classifier; ConfigError if the folder doesn't contain one."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        about = json.loads((folder / ABOUT).read_text())
        weights = load_file(str(folder / WEIGHTS))["weights"]
        features = NgramCounter(int(about["ngrams"]), int(about["bits"]), int(about["chars"]))
        scorer = LinearScorer(weights, float(about["bias"]), features)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        why = "a file is missing" if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: {e}"
        raise ConfigError(
            f"model: {str(folder)!r} contains no classifier ({why}). Train one: heliostat data train-classifier"
        ) from e
    if about.get("format") != 1 or weights.dtype != np.float32 or weights.shape != (1 << features.bits,):
        raise ConfigError(
            f"model: {str(folder)!r}: weights of {weights.dtype} {weights.shape} don't match the keys in {ABOUT}. "
            "Train the classifier again: heliostat data train-classifier"
        )
    return scorer


def train(
    good: Sequence[str], bad: Sequence[str], ngrams: int = 2, bits: int = 18, chars: int = 10_000, held_out: float = 0.2
) -> tuple[LinearScorer, TrainingReport]:
    """Trains a classifier on texts of good and of bad documents. Returns the classifier, and a report with precision and recall
    on held-out documents.

    The texts' hashes select the held-out documents; equal texts count once. ConfigError if there are too few documents.
    """
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    examples = dict.fromkeys(good, 1) | dict.fromkeys(bad, 0)
    both = len(set(good) & set(bad))
    if both:
        raise ConfigError(f"{both:,} documents are in both folders of examples. Remove these documents from one folder")
    ordered = sorted(examples, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    labels = np.array([examples[text] for text in ordered])
    test = np.zeros(len(ordered), bool)
    for label in (0, 1):
        places = np.flatnonzero(labels == label)
        if len(places) < 10:
            raise ConfigError(
                f"there are only {len(places)} different examples of {'good' if label else 'bad'} documents. "
                "Add documents until there are 10"
            )
        test[places[: max(1, round(held_out * len(places)))]] = True
    features = NgramCounter(ngrams, bits, chars)
    rows = [features(text) for text in ordered]
    ends = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    values = np.concatenate([np.full(len(r), 1 / max(len(r), 1)) for r in rows])
    matrix = csr_matrix((values, np.concatenate(rows), ends), shape=(len(rows), 1 << bits))
    regression = LogisticRegression(C=1e4, max_iter=300, class_weight="balanced").fit(matrix[~test], labels[~test])
    linear = LinearScorer(regression.coef_[0].astype(np.float32), float(regression.intercept_[0]), features)
    scores = np.array([linear.score(text) for text, is_held_out in zip(ordered, test, strict=True) if is_held_out])
    return linear, _report(scores, labels[test], labels[~test])


def _report(scores: np.ndarray, held_out: np.ndarray, trained: np.ndarray) -> TrainingReport:
    """Computes precision and recall of the good documents at five score thresholds, and counts the documents."""
    at = dict[str, ThresholdScores]()
    for threshold in (0.1, 0.25, 0.5, 0.75, 0.9):
        chosen = scores >= threshold
        hits = int((chosen & (held_out == 1)).sum())
        precision = round(hits / int(chosen.sum()), 4) if chosen.any() else None
        at[str(threshold)] = {"precision": precision, "recall": round(hits / int((held_out == 1).sum()), 4)}
    return {"held_out": at, "trained_good": int(trained.sum()), "trained_bad": int((trained == 0).sum()),
            "held_out_good": int(held_out.sum()), "held_out_bad": int((held_out == 0).sum())}  # fmt: skip
