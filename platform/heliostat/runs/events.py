"""Defines the events of a run, as the workers and the driver report them: a dataclass each, one home for their fields.

Workers post them to the mailbox, the driver hands each to each reader: the goodput ledger, MLflow, the terminal, a sweep.
Those that curves are made of also lie next to the checkpoints (`dump`): what a field is called there never changes, and a
field that is new has a default, so that older runs can be read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from heliostat.cluster.capacity import LivingNode
from heliostat.errors import HeliostatError

Scores = dict[str, float]


@dataclass(kw_only=True)
class Event:
    """Describes an event. `at`: wall clock. `ledger`: rank 0's seconds by part so far, where it reports them."""

    at: float = field(default_factory=time.time)
    ledger: dict[str, float] | None = None


@dataclass(kw_only=True)
class Phase(Event):
    """Reports the phase that the workers are in: placing, model, restore, data, step, stepped, ended."""

    phase: str


@dataclass(kw_only=True)
class ModelPhase(Phase):
    """Reports that the workers run, and begin to build the model. `queued_s`: how long their placement group waited."""

    phase: str = "model"
    queued_s: float
    start_step: int
    workers: int


@dataclass(kw_only=True)
class Steps(Event):
    """Reports the steps `first`, `first` + 1, ..., counted from 0: the lists hold a value for each; the other values are of all
    steps."""

    kind: ClassVar[str] = "steps"
    first: int
    loss: list[float]
    grad_norm: list[float]
    lr: list[float]
    seconds: float
    tokens_per_second: float | None = None
    data_wait: float | None = None  # a fraction of the seconds
    mfu: float | None = None
    bad_samples: float | None = None  # replaced so far in the run
    added: dict[str, list[float]] = field(default_factory=dict)  # of each step, by name: parts of the objective, other metrics
    experts: dict[str, list[float]] = field(default_factory=dict)  # their load, of a mixture of experts, by name
    skipped_steps: float | None = None  # so far, in fp16
    loss_scale: float | None = None
    sources: dict[str, dict[str, float]] = field(default_factory=dict)  # the driver's: what each source has given

    @property
    def done(self) -> int:
        """Returns the number of steps of the run that are done."""
        return self.first + len(self.loss)


@dataclass(kw_only=True)
class LossSpike(Event):
    """Reports that step number `step`, counted from 1, has a loss far above what is usual."""

    kind: ClassVar[str] = "spike"
    step: int
    loss: float
    limit: float
    usual: float = float("nan")
    action: str = "warn"

    @property
    def text(self) -> str:
        return f"loss {self.loss:.4g}, where {self.usual:.4g} is usual and {self.limit:.4g} the limit"


@dataclass(kw_only=True)
class Corruption(Event):
    """Reports that workers computed other bits than others (`train.sdc_check`): their nodes, and what was found, in one line."""

    nodes: list[str]
    text: str


@dataclass(kw_only=True)
class Evaluation(Event):
    """Reports the held-out scores after `step` steps, and the pictures that were drawn, PNG by name."""

    kind: ClassVar[str] = "evaluation"
    step: int
    scores: Scores
    images: dict[str, bytes] = field(default_factory=dict)


@dataclass(kw_only=True)
class Saved(Event):
    """Reports a checkpoint after `step` steps; training has waited for checkpoints `blocked_s` seconds so far, and `failed` saves
    of this attempt have failed."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    blocked_s: float
    failed: int = 0


@dataclass(kw_only=True)
class Paused(Event):
    """Reports that the workers wait behind the checkpoint of `step` for a decision."""

    step: int
    scores: Scores


@dataclass(kw_only=True)
class Notice(Event):
    """Reports something that a person should read at the terminal."""

    text: str


@dataclass(kw_only=True)
class Waiting(Notice):
    """Reports that the run waits, and for what."""


@dataclass(kw_only=True)
class Stack(Event):
    """Reports the stacks of a worker's threads."""

    rank: int
    stack: str


@dataclass(kw_only=True)
class Profiled(Event):
    """Reports that a profile's files are in the run's folder. `id`: of the request (`runs.profile`)."""

    id: str
    files: list[str]


@dataclass(kw_only=True)
class WorkerFailed(Event):
    """Reports the error of a worker before the worker cleans up, which may never end on a broken device."""

    rank: int
    error: HeliostatError


@dataclass(kw_only=True)
class BadNodes(Event):
    """Reports nodes on which workers fail or compute wrongly, and what was done about them, in one line."""

    nodes: list[str]
    text: str


@dataclass(kw_only=True)
class NodeSample(Event):
    """Reports a sample of a node's load; `step` is the driver's."""

    node: str
    values: dict[str, float]
    step: int = 0


@dataclass(kw_only=True)
class AttemptStarted(Event):
    """Reports that the driver starts workers. `nodes`: the inventory of the cluster's nodes."""

    start_step: int
    workers: int
    nodes: list[LivingNode]


@dataclass(kw_only=True)
class Goodput(Event):
    """Reports where the run's seconds went, up to `step` steps."""

    report: Mapping[str, Any]
    step: int


RECORDED: dict[str, type[Event]] = {e.kind: e for e in (Steps, LossSpike, Evaluation, Saved)}
LEFT_OUT = ("ledger", "images")  # of what is recorded


def dump(event: Event) -> dict[str, object]:
    """Converts an event of RECORDED to JSON values."""
    kind = next(name for name, cls in RECORDED.items() if type(event) is cls)
    return {"kind": kind, **{k: v for k, v in vars(event).items() if k not in LEFT_OUT}}
