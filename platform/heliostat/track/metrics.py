"""What MLflow gets of a run's events: points of curves."""

from __future__ import annotations

from typing import NamedTuple

from heliostat.events import Evaluation, Event, Goodput, NodeSample, Saved, Spike, Steps

SPIKE, SPIKE_LIMIT = "train/spike", "train/spike_limit"  # a spike's loss, and the limit that it is above; at spikes alone
SYSTEM = "system/"  # begins the names of what nodes are busy with


class Point(NamedTuple):
    """A metric's value; `at` is the wall clock, `step` counts finished steps."""

    key: str
    value: float
    at: float
    step: int

    @property
    def place(self) -> int:
        """What grows along the metric: the step; milliseconds for what is of a time rather than of a step."""
        return int(self.at * 1000) if self.key.startswith(("goodput/", SYSTEM)) else self.step


def points(event: Event) -> list[Point]:
    """What an event is logged as."""
    match event:
        case Steps():
            return _of_steps(event)
        case Spike():
            return [Point(SPIKE, event.loss, event.at, event.step), Point(SPIKE_LIMIT, event.limit, event.at, event.step)]
        case Evaluation():
            return [Point(f"eval/{k}", v, event.at, event.step) for k, v in event.scores.items()]
        case Goodput(report=report):
            values = {"fraction": report["goodput"], "worker_hours": report["worker_hours"]}
            values |= {f"{part}_s": seconds for part, seconds in report["parts"].items()}
            return [Point(f"goodput/{k}", v, event.at, event.step) for k, v in values.items()]
        case NodeSample():
            return [Point(f"{SYSTEM}{event.node}/{k}", v, event.at, event.step) for k, v in event.values.items()]
        case Saved():
            return [Point("checkpoint/blocked_s", event.blocked_s, event.at, event.step)]
    return []


def _of_steps(event: Steps) -> list[Point]:
    each, out = event.seconds / len(event.loss), []
    for i in range(len(event.loss)):
        when, step = event.at - each * (len(event.loss) - 1 - i), event.first + i + 1
        curves = {"loss": event.loss, "lr": event.lr, "grad_norm": event.grad_norm, **event.added}
        out += [Point(f"train/{name}", values[i], when, step) for name, values in curves.items()]
    for key in ("tokens_per_second", "data_wait", "mfu", "bad_samples", "skipped_steps", "loss_scale"):
        if (value := getattr(event, key)) is not None:
            out.append(Point(f"train/{key}", value, event.at, event.done))
    for name, given in event.sources.items():
        out += [Point(f"data/{name}/{key}", value, event.at, event.done) for key, value in given.items()]
    return out
