"""What MLflow gets of a run's events: points of curves."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

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


def points(event: dict[str, Any]) -> list[Point]:
    """What an event is logged as."""
    at = event.get("at", time.time())
    if event["kind"] == "steps":
        first, count = event["first"], len(event["loss"])
        each = event["seconds"] / count
        out = []
        for i in range(count):
            when = at - each * (count - 1 - i)
            for key in ("loss", "lr", "grad_norm"):
                out.append(Point(f"train/{key}", event[key][i], when, first + i + 1))
            for name, values in event.get("added", {}).items():  # not in the events of older runs
                out.append(Point(f"train/{name}", values[i], when, first + i + 1))
        for key in ("tokens_per_second", "data_wait", "mfu", "bad_samples", "skipped_steps", "loss_scale"):
            if event.get(key) is not None:
                out.append(Point(f"train/{key}", event[key], at, first + count))
        for name, given in event["sources"].items():
            out += [Point(f"data/{name}/{key}", value, at, first + count) for key, value in given.items()]
        return out
    if event["kind"] == "spike":
        return [Point(key, event[name], at, event["step"]) for key, name in ((SPIKE, "loss"), (SPIKE_LIMIT, "limit"))]
    if event["kind"] == "evaluation":
        return [Point(f"eval/{k}", v, at, event["step"]) for k, v in event["scores"].items()]
    if event["kind"] == "goodput":
        report = event["report"]
        values = {"fraction": report["goodput"], "worker_hours": report["worker_hours"]}
        values |= {f"{part}_s": seconds for part, seconds in report["parts"].items()}
        return [Point(f"goodput/{k}", v, at, event["step"]) for k, v in values.items()]
    if event["kind"] == "system":
        return [Point(f"{SYSTEM}{event['node']}/{k}", v, at, event["step"]) for k, v in event["values"].items()]
    if event["kind"] == "checkpoint":
        return [Point("checkpoint/blocked_s", event["blocked_s"], at, event["step"])]
    return []
