"""Declares every metric of a run once: its name in MLflow, the events that contain it, and its chart in the report.

The points for MLflow (`points`) and the charts of the report (`page`) follow from METRICS. If events already contain a value, a
new line in METRICS makes this value a metric. A new value per step needs no new field: `training.worker.step` puts the value into
`Steps.added`. A line in METRICS then draws the value and reserves its name (`RESERVED`).

MLflow's UI groups charts into sections, by the part of the name before the last slash. Sections are in alphabetical order;
system metrics come last. So held-out scores (`eval/`) come first, then the training curves (`train/`), then metrics that users
rarely need (`train/data/corpus/epochs`). `formerly` is a metric's name in older runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from heliostat.runs.events import Evaluation, Event, Goodput, LossSpike, NodeSample, Saved, Steps

SPIKE, SPIKE_LIMIT = "train/spike", "train/spike_limit"  # only at spikes: the loss, and the limit that it exceeds
CHECKPOINT = "train/checkpoint/"  # prefix of the scores of a checkpoint's logged model
SYSTEM, TIME = "system/", "train/time/"  # prefixes of metrics that belong to a time, not to a step


Number: TypeAlias = float | list[float]  # one value, or a list with one value per step
Values: TypeAlias = Number | Mapping[str, Number | None] | None  # a mapping's keys are the texts that `*` stands for


class Point(NamedTuple):
    """Holds one value of a metric. `at`: seconds since the epoch. `step`: number of finished steps."""

    key: str
    value: float
    at: float
    step: int

    @property
    def place(self) -> int:
        """Returns the coordinate that increases along the metric.

        The coordinate is the step. For metrics of a time instead of a step (system metrics, `train/time/`), the coordinate is the
        time in milliseconds.
        """
        return int(self.at * 1000) if self.key.startswith((TIME, SYSTEM)) else self.step


@dataclass(frozen=True)
class Metric:
    """Declares one metric: its name, the events that contain it, and its chart in the report.

    `name`: its name in MLflow; a `*` stands for a text from the event. `value`: extracts a value from an event of `kind`: a
    number, None, or a list with one number per step. If the name has a `*`, `value` extracts a mapping from texts to values.

    `chart`: the chart's title in the report; metrics with the same title share a chart. With "" the metric has no chart; `{}`
    stands for the text of the `*`. `section`: the report's section for the chart. `mark`: whether to draw dots instead of a
    line. `formerly`: the name in older runs.
    """

    name: str
    kind: type[Event]
    value: Callable[[Any], Values]
    chart: str = ""
    unit: str = ""
    section: str = "Learning"
    mark: bool = False
    formerly: str = ""

    def star(self, name: str) -> str | None:
        """Returns the text that the `*` stands for in `name`. Returns "" if the metric has no `*`, and None if `name` isn't a
        name of this metric."""
        return _star(self.name, name)


def _of(key: str) -> Callable[[Event], Values]:
    return lambda event: getattr(event, key)


def _of_source(key: str) -> Callable[[Steps], Values]:
    return lambda event: {source: counts.get(key) for source, counts in event.sources.items()}


def _of_experts(key: str) -> Callable[[Steps], Values]:
    return lambda event: event.experts.get(key)


def _bounds(end: str) -> Callable[[Evaluation], Values]:
    """Extracts the bounds of scores that have an interval. The report draws a score's bounds in the score's chart."""
    return lambda event: {score: event.scores[f"{score}{end}"] for score in event.scores if f"{score}{end}" in event.scores}


# the report shows charts, and the curves in them, in this order
METRICS = (
    Metric("train/loss", Steps, _of("loss"), "Loss"),
    Metric("eval/loss", Evaluation, lambda e: e.scores.get("loss"), "Loss"),
    Metric(SPIKE, LossSpike, _of("loss"), "Loss", mark=True),
    Metric(SPIKE_LIMIT, LossSpike, _of("limit")),
    Metric("eval/*_low", Evaluation, _bounds("_low"), "{}"),
    Metric("eval/*_high", Evaluation, _bounds("_high"), "{}"),
    Metric("eval/*", Evaluation, _of("scores"), "{}"),
    Metric("train/lr", Steps, _of("lr"), "Learning rate", section="Optimizer"),
    Metric("train/grad_norm", Steps, _of("grad_norm"), "Gradient norm", section="Optimizer"),
    Metric("train/loss_scale", Steps, _of("loss_scale"), "Loss scale (fp16)", section="Optimizer"),
    Metric("train/skipped_steps", Steps, _of("skipped_steps"), "Skipped steps (fp16)", section="Optimizer"),
    Metric("train/tokens_per_second", Steps, _of("tokens_per_second"), "Throughput", "tokens or samples/s", "Speed"),
    Metric("train/mfu", Steps, _of("mfu"), "Model FLOPs utilization", "of the peak", "Speed"),
    Metric("train/data/wait", Steps, _of("data_wait"), "Wait for data", "of the time", "Speed", formerly="train/data_wait"),
    Metric("train/data/*/epochs", Steps, _of_source("epochs"), "Epochs of each source", section="Data",
           formerly="data/*/epochs"),
    Metric("train/data/*/samples", Steps, _of_source("samples"), formerly="data/*/samples"),
    Metric("train/data/*/tokens", Steps, _of_source("tokens"), formerly="data/*/tokens"),
    Metric("train/data/*/trained_tokens", Steps, _of_source("trained_tokens"), "Trained tokens of each source", "per step",
           "Data"),
    Metric("train/data/bad_samples", Steps, _of("bad_samples"), "Bad samples, replaced", section="Data",
           formerly="train/bad_samples"),
    Metric("train/experts/imbalance", Steps, _of_experts("imbalance"), "Load of experts", "busiest over mean", "Experts"),
    Metric("train/experts/imbalance_worst", Steps, _of_experts("imbalance_worst"), "Load of experts", section="Experts"),
    Metric("train/experts/unused", Steps, _of_experts("unused"), "Experts without a token", "of all", "Experts"),
    Metric("train/experts/dropped", Steps, _of_experts("dropped"), "Assignments dropped", "of all", "Experts"),
    Metric("train/time/goodput", Goodput, lambda e: e.report["goodput"], formerly="goodput/fraction"),
    Metric("train/time/worker_hours", Goodput, lambda e: e.report["worker_hours"], formerly="goodput/worker_hours"),
    Metric("train/time/*_s", Goodput, lambda e: e.report["parts"], formerly="goodput/*_s"),
    Metric(CHECKPOINT + "*", Saved, lambda e: {"blocked_s": e.blocked_s, "failed": e.failed or None}, formerly="checkpoint/*"),
    Metric(SYSTEM + "*", NodeSample, lambda e: {f"{key} {e.node}": value for key, value in e.values.items()}),
    Metric("train/*", Steps, _of("added"), "{}"),  # the recipe's terms in addition to the loss
)  # fmt: skip

# every NAME of `train/NAME` that metrics use now or in older runs; terms of a recipe's loss need other names
_NAMES = (name.removeprefix("train/") for metric in METRICS for name in (metric.name, metric.formerly))
RESERVED = tuple(name for name in _NAMES if name.isidentifier())


def points(event: Event) -> list[Point]:
    """Converts an event to points (metric, step, value) for MLflow.

    A step's loss comes last. So if the loss has arrived, all metrics of the step have arrived. In a run's first event the loss
    comes first, because MLflow's UI lists metrics in the order of the first event.
    """
    at, first, step, count, each = event.at, 0, getattr(event, "step", 0), 0, 0.0
    if isinstance(event, Steps):
        first, step, count = event.first, event.done, len(event.loss)
        each = event.seconds / count
    once, stepwise = list[Point](), list[list[Point]]()
    for key, value in _values(event):
        if isinstance(value, list):
            stepwise.append([Point(key, v, at - each * (count - 1 - i), first + i + 1) for i, v in enumerate(value)])
        else:
            once.append(Point(key, value, at, step))
    if not first:
        return [point for group in zip(*stepwise, strict=True) for point in group] + once
    return once + [point for group in zip(*reversed(stepwise), strict=True) for point in group]


def _values(event: Event) -> Iterable[tuple[str, Number]]:
    """Yields (name, number or list) for each metric that has a value in the event.

    If two metrics produce the same name, the first metric counts.
    """
    known = set[str]()
    for metric in METRICS:
        value = metric.value(event) if isinstance(event, metric.kind) else None
        named = value if isinstance(value, Mapping) else {"": value}
        for star, number in named.items():
            name = metric.name.replace("*", star)
            if number is not None and name not in known:
                known.add(name)
                yield name, number


def metric_of(name: str) -> Metric | None:
    """Returns the metric that has this name; None if there is no such metric."""
    return next((m for m in METRICS if m.star(name) is not None), None)


def renamed(name: str) -> str:
    """Converts the name of a metric in an older run to its present name."""
    for metric in METRICS:
        if metric.formerly and (star := _star(metric.formerly, name)) is not None:
            return metric.name.replace("*", star)
    return name


def latest(recorded: Mapping[str, float]) -> dict[str, float]:
    """Maps a run's metrics to their present names.

    If a metric was logged under its former and its present name, the value of the present name counts.
    """
    return {renamed(key): value for key, value in recorded.items()} | {
        key: value for key, value in recorded.items() if renamed(key) == key
    }


def _star(pattern: str, name: str) -> str | None:
    before, star, after = pattern.partition("*")
    if not star:
        return "" if name == pattern else None
    match = re.fullmatch(f"{re.escape(before)}(.+){re.escape(after)}", name)
    return match[1] if match else None
