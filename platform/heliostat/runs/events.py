"""Defines the events that the workers and the driver of a run report. Each kind of event is a dataclass.

Workers post events to the mailbox. The driver passes each event to all readers: the goodput ledger, MLflow, the terminal, and a
sweep. The events for the curves are also saved next to the checkpoints (`dump`). The names of saved fields never change, and
new fields have a default. So older runs stay readable.
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
    """Describes an event. `at`: wall-clock time. `ledger`: the seconds of rank 0 until now, by part of the goodput report, if the
    event reports them."""

    at: float = field(default_factory=time.time)
    ledger: dict[str, float] | None = None


@dataclass(kw_only=True)
class Phase(Event):
    """Reports the phase of the workers: placing, model, restore, data, step, stepped, or ended."""

    phase: str


@dataclass(kw_only=True)
class ModelPhase(Phase):
    """Reports that the workers run and begin to build the model. `queued_s`: seconds for which the workers' placement group
    waited."""

    phase: str = "model"
    queued_s: float
    start_step: int
    workers: int


@dataclass(kw_only=True)
class Steps(Event):
    """Reports the steps `first`, `first` + 1, ..., counted from 0. A list has one value per step. A value that isn't a list is
    for all these steps together."""

    kind: ClassVar[str] = "steps"
    first: int
    loss: list[float]
    grad_norm: list[float]
    lr: list[float]
    seconds: float
    tokens_per_second: float | None = None
    data_wait: float | None = None  # as a fraction of `seconds`
    mfu: float | None = None
    bad_samples: float | None = None  # number of samples that were replaced in the run until now
    added: dict[str, list[float]] = field(default_factory=dict)  # parts of the objective and other metrics, by name and step
    experts: dict[str, list[float]] = field(default_factory=dict)  # measures of the load of a mixture's experts, by name
    skipped_steps: float | None = None  # number of skipped steps until now, in fp16
    loss_scale: float | None = None
    trained: list[float] = field(default_factory=list)  # trained tokens per step of each source, if samples have a loss mask
    sources: dict[str, dict[str, float]] = field(default_factory=dict)  # set by the driver: values of each source

    @property
    def done(self) -> int:
        """Returns the number of the run's finished steps."""
        return self.first + len(self.loss)


@dataclass(kw_only=True)
class LossSpike(Event):
    """Reports that the loss of step number `step`, counted from 1, is far above the usual loss."""

    kind: ClassVar[str] = "spike"
    step: int
    loss: float
    limit: float
    usual: float = float("nan")
    action: str = "warn"

    @property
    def text(self) -> str:
        return f"loss {self.loss:.4g} (usual loss {self.usual:.4g}, limit {self.limit:.4g})"


@dataclass(kw_only=True)
class Corruption(Event):
    """Reports that workers computed different bits from the same values (`train.sdc_check`). `nodes`: the nodes of these workers.
    `text`: one line about the corruption."""

    nodes: list[str]
    text: str


@dataclass(kw_only=True)
class Evaluation(Event):
    """Reports the held-out scores after `step` steps, and the images (PNG) that the model generated, by name."""

    kind: ClassVar[str] = "evaluation"
    step: int
    scores: Scores
    images: dict[str, bytes] = field(default_factory=dict)


@dataclass(kw_only=True)
class Saved(Event):
    """Reports a checkpoint after `step` steps. `blocked_s`: seconds for which training has waited for checkpoints until now.
    `failed`: number of failed saves of this attempt until now."""

    kind: ClassVar[str] = "checkpoint"
    step: int
    blocked_s: float
    failed: int = 0


@dataclass(kw_only=True)
class Paused(Event):
    """Reports that the workers wait for a decision whether to continue, after the checkpoint of `step`."""

    step: int
    scores: Scores


@dataclass(kw_only=True)
class Notice(Event):
    """Reports a text that is shown to the person at the terminal."""

    text: str


@dataclass(kw_only=True)
class Waiting(Notice):
    """Reports that the run waits; `text` gives the reason."""


@dataclass(kw_only=True)
class Stack(Event):
    """Reports the stacks of a worker's threads."""

    rank: int
    stack: str


@dataclass(kw_only=True)
class Profiled(Event):
    """Reports that the files of a profile are in the run's folder. `id`: the request's id (`runs.profile`)."""

    id: str
    files: list[str]


@dataclass(kw_only=True)
class WorkerFailed(Event):
    """Reports the error of a worker. The worker sends this event before its cleanup, because the cleanup may never end on a
    broken device."""

    rank: int
    error: HeliostatError


@dataclass(kw_only=True)
class BadNodes(Event):
    """Reports nodes on which workers fail or compute wrong results. `text`: one line about the action that was taken."""

    nodes: list[str]
    text: str


@dataclass(kw_only=True)
class NodeSample(Event):
    """Reports a sample of a node's load. The driver sets `step`."""

    node: str
    values: dict[str, float]
    step: int = 0


@dataclass(kw_only=True)
class AttemptStarted(Event):
    """Reports that the driver starts workers. `nodes`: all nodes of the cluster."""

    start_step: int
    workers: int
    nodes: list[LivingNode]


@dataclass(kw_only=True)
class Goodput(Event):
    """Reports how the run has used its time until step `step`, as a goodput report."""

    report: Mapping[str, Any]
    step: int


RECORDED: dict[str, type[Event]] = {e.kind: e for e in (Steps, LossSpike, Evaluation, Saved)}
LEFT_OUT = ("ledger", "images")  # fields that aren't saved


def dump(event: Event) -> dict[str, object]:
    """Converts an event to JSON values. The event's type must be in RECORDED."""
    kind = next(name for name, cls in RECORDED.items() if type(event) is cls)
    return {"kind": kind, **{k: v for k, v in vars(event).items() if k not in LEFT_OUT}}
