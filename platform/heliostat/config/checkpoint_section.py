"""Defines the sections `evaluate` and `checkpoint` of the job file: when a run is scored and saved, and what stays of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from heliostat.config.fields import Positive
from heliostat.schema import Float, Strict

BENCHMARK = "bench/"  # and a task's name: what its score is called


class Benchmarks(Strict):
    suite: str = Field(min_length=1)
    """A suite's file (docs/benchmark.md), from the workspace on."""
    every: Positive
    """Steps between two checkpoints that are scored: a multiple of `checkpoint.every`. The last is always scored."""
    wait: Annotated[Float, Field(ge=0)] = 3600.0
    """Seconds that the end of the run waits for the last scores."""


class Evaluate(Strict):
    every: Positive
    """Steps between two evaluations. The last step is always evaluated."""
    samples: Positive = 256
    """Held-out samples that are scored, at most; where there are fewer, the run says so."""
    fraction: Annotated[Float, Field(gt=0, lt=1)] = 0.01
    """Share of the documents that is held out by the hash of their text, and never trained on. 1, 2 and 5 parts of ten to ten
    thousand are exact, see docs/data-order.md#what-is-held-out"""
    benchmarks: Benchmarks | None = None
    """Scores checkpoints on tasks, beside the training. Unset: none. See docs/benchmark.md#while-a-run-trains"""


class Best(Strict):
    metric: str = "loss"
    """A score of the evaluation, as the recipe reports it; or `bench/TASK`, which `heliostat benchmark --follow` gives later."""
    mode: Literal["min", "max"] = "min"
    """Whether a low or a high score is good."""
    keep: Positive = 1
    """So many checkpoints with the best scores stay."""

    @property
    def is_late(self) -> bool:
        """Tells whether the score is a benchmark's, which comes after the save."""
        return self.metric.startswith(BENCHMARK)


class Checkpoint(Strict):
    every: Positive
    """Steps between two checkpoints."""
    keep: Positive = 2
    """So many of the newest stay."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of so many steps stay for ever. Unset: no such rule."""
    best: Best | None = None
    """The best by a score stay, too. Unset: no such rule. See docs/checkpoints.md#what-is-kept"""
    grace: Annotated[Float, Field(gt=0)] = 60.0
    """Seconds for the last checkpoint after SIGTERM, Ctrl-C or a preemption notice."""
    memory_every: Positive | None = None
    """Steps between two copies of the training state in the memory of its node and of another, from which a run goes on after a
    failure; it loses at most so many steps. Unset: none, only checkpoints. See docs/reliability.md#copies-in-memory"""
    memory_limit: ByteSize = ByteSize(8 << 30)
    """Bytes (`8GiB`) of each node's memory for these copies. Where they need more, none are kept, and the run says so."""
