"""Estimates the tokens per byte of a complete dataset from a sample, for a tokenizer that is trained on the dataset.

A tokenizer trained on little text needs few tokens for its training text, and more tokens for other text. This difference shrinks
as the training text grows. To measure the difference, heliostat trains a tokenizer on half of the sample, and encodes both
halves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from heliostat.curation.predicting import Rate
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.curation.text import tokens
from heliostat.storage.locations import Location
from heliostat.tasks import cpu_time, spill

ENCODED = 16 << 20  # maximum bytes of each half that are encoded
ENOUGH = 1.5  # minimum ratio of two text sizes for measuring how the time grows
SLOWEST = 0.5  # minimum exponent, because short times vary by chance


def halves(folder: Location, runs: list[SpilledRun], config: dict[str, Any]) -> dict[str, Any]:
    """Trains a tokenizer on half of the sample's documents, which hashes select, up to `train_bytes`. Returns the tokens per byte
    of this text (`own`) and of the other half (`other`; None if a half is empty), the bytes of training text, and the CPU
    seconds."""
    limit, start = min(config["train_bytes"], ENCODED), cpu_time.now()
    definition = tokens.train(_texts(folder, runs, 0, limit), config["vocab_size"], config["end_of_document"])
    tokenizer, took = tokens.load(definition), cpu_time.now() - start
    end = tokens.end_id(tokenizer, config["end_of_document"])
    rates = []
    for half, most in ((0, limit), (1, ENCODED)):
        count = bytes = 0
        for text in _texts(folder, runs, half, most):
            count += sum(len(ids) for ids in tokens.encode(tokenizer, [text], end))
            bytes += len(text.encode())
        rates.append((count, bytes))
    (own, trained), (other, rest) = rates
    return {"own": own / trained if trained else None, "other": other / rest if rest else None, "trained": trained, "took": took}


def training_grows(seconds: float, bytes: float, measured: dict[str, Any]) -> float:
    """Estimates the exponent e of a tokenizer's training time: the time is proportional to (bytes of text)^e. Compares the
    `seconds` for `bytes` bytes with the seconds for half of the sample (`measured`, from `halves`). The exponent is at most 1,
    because counting words takes time in proportion to the text. The exponent is usually smaller, because words repeat."""
    if bytes < ENOUGH * measured["trained"] or not 0 < measured["took"] < seconds:
        return 1.0
    return min(1.0, max(SLOWEST, math.log(seconds / measured["took"]) / math.log(bytes / measured["trained"])))


def _texts(folder: Location, runs: list[SpilledRun], half: int, most: int) -> Iterator[str]:
    """Yields the texts of one half of the documents, up to `most` bytes. `half`: 0 for even hashes, 1 for odd hashes."""
    taken, total = 0, sum(run.bytes for run in runs)
    high = spill.ALL if total <= 2 * most else spill.ALL * 2 * most // total
    for run in runs:
        for table in survivors(folder, run, 0, high, ["bytes", "text"]):
            for key, size, text in zip(table["key"].to_pylist(), table["bytes"].to_pylist(), table["text"], strict=True):
                if key & 1 == half:
                    if taken >= most:
                        return
                    taken += size
                    yield text.as_py()


def of_whole(seen: float, sampled: float, measured: dict[str, Any], train_bytes: int, whole: float) -> Rate:
    """Estimates the tokens per byte for an input of `whole` bytes, from the tokens per byte `seen` in a sample of `sampled`
    bytes. The input and the sample each have their own tokenizer, trained on up to `train_bytes` bytes.

    The estimate compares each tokenizer with a tokenizer that is trained on infinite text. With a tokenizer trained on finite
    text, the training text has fewer tokens than with this ideal tokenizer. Other text has more tokens, by the same amount. Both
    differences shrink as the training text grows. The lower bound of the result is about the sample's value. The upper bound is
    about the value of the half that wasn't training text.
    """
    own, other = measured["own"], measured["other"]
    if own is None or other is None or other <= own:
        return Rate(seen, seen, seen)
    most = (other - own) / 2

    def more(bytes: float) -> float:
        trained = min(train_bytes, bytes)
        return most * min(1.0, measured["trained"] / trained) * (1 - 2 * trained / bytes)

    endless = seen - more(sampled)
    return Rate(endless + more(whole), min(seen, endless + more(whole)), endless + most)
