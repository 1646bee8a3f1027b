"""Measures the CPU time of a worker, including the processes that run parsers for it (`isolated`).

Stages and tasks are measured in CPU time, so that predictions are the same on a busy machine and on an idle machine. The time
for loading compiled code, tables of characters, and tokenizers is apart, because it doesn't grow with the documents.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_elsewhere = _loading = 0.0
_depth = 0  # of `loading`


def add(seconds: float) -> None:
    """Adds CPU seconds that another process spent for this process."""
    global _elsewhere
    _elsewhere += seconds


@contextmanager
def loading() -> Iterator[None]:
    """Counts the CPU seconds of the block in `loaded`, and not in `now`. A block may contain others."""
    global _depth, _loading
    start, _depth = time.process_time(), _depth + 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _loading += time.process_time() - start


def loaded() -> float:
    """Returns the CPU seconds so far in blocks of `loading`."""
    return _loading


def now() -> float:
    """Returns the CPU seconds so far: of all threads, and of the processes that were counted with `add`, without `loaded`."""
    return time.process_time() + _elsewhere - _loading
