"""Estimates how many tokens a byte a dataset will have whose tokenizer is trained on it, from a sample of it.

A tokenizer that is trained on little text fits that text well, and other text badly; the difference falls about as the text
grows. So half of a sample trains one, which encodes both halves.
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

ENCODED = 16 << 20  # bytes of each half that are encoded, at most
ENOUGH = 1.5  # times as much text, that tells how time grows
SLOWEST = 0.5  # power, lest chance in small times says what it likes


def halves(folder: Location, runs: list[SpilledRun], config: dict[str, Any]) -> dict[str, Any]:
    """Trains a tokenizer on half of the documents, by their hashes, up to `train_bytes`; returns the tokens a byte of that text
    (`own`), of the other half (`other`; None if one is empty), the bytes that trained it, and the CPU seconds of that."""
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
    """Estimates the power of its text with which the time grows that training a tokenizer takes, from the seconds that so many
    bytes took, and those of half of them (`halves`): at most 1, as text is counted, and less, as words come again."""
    if bytes < ENOUGH * measured["trained"] or not 0 < measured["took"] < seconds:
        return 1.0
    return min(1.0, max(SLOWEST, math.log(seconds / measured["took"]) / math.log(bytes / measured["trained"])))


def _texts(folder: Location, runs: list[SpilledRun], half: int, most: int) -> Iterator[str]:
    """Yields the texts of a half of all keys, of the lowest as far as there are more than so many bytes."""
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
    """Estimates the rate of a whole of so many bytes from that `seen` in a sample of `sampled` bytes, each with a tokenizer that
    is trained on `train_bytes` of its own.

    Text that trains a tokenizer is taken to have as many fewer tokens than by one of endless text as other text has more, and
    both differences to fall as the text that trains it grows. The bounds are the rate of the sample, and that of text which
    trained nothing, with half of the sample.
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
