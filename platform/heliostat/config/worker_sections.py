"""Defines the sections `workers`, `limits`, `retries`, `watchdog` and `spike` of the job file: what trains, how long, and what is
done on failure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from heliostat.config.fields import LARGEST, NonNegative
from heliostat.schema import Float, Strict


def _count(value: object) -> object:
    """Validates a number of workers, or [least, most]."""
    both: list[Any] = value if isinstance(value, list) else [value, value]
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in both)
    if len(both) != 2 or not whole or not 0 < both[0] <= both[1] <= LARGEST:
        raise ValueError(f"{value!r} is neither a number of workers nor [least, most], as [1, 4]")
    return value


class Workers(Strict):
    count: Annotated[int | list[int], BeforeValidator(_count)] = 1
    """How many; or `[least, most]` for an elastic run, see docs/reliability.md#elastic-runs"""
    cpus: Annotated[Float, Field(gt=0)] = 1.0
    """Cores of each."""
    gpus: Annotated[Float, Field(ge=0)] = 0.0
    """GPUs of each: 1, or 0 to train on CPUs with gloo."""
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    """`pack`: on as few nodes as possible; `spread`: on as many; `strict_spread`: each on a node of its own."""
    labels: dict[str, str] = {}
    """Only nodes that carry these Ray labels hold workers. Empty: any node."""

    @property
    def least(self) -> int:
        return self.count[0] if isinstance(self.count, list) else self.count

    @property
    def most(self) -> int:
        return self.count[1] if isinstance(self.count, list) else self.count


class Limits(Strict):
    hours: Annotated[Float, Field(gt=0)] | None = None
    """Hours of the run, over all its commands; time between two commands doesn't count. At the limit the run stops after a
    checkpoint; `--resume` with a higher limit continues. See docs/reliability.md#limits"""
    cost: Annotated[Float, Field(gt=0)] | None = None
    """The same of money: what the devices that workers hold cost, by the list prices of `heliostat plan`, in its currency."""


class Retries(Strict):
    max: Annotated[int, Field(ge=0)] = 10
    """Failures in a row without a new checkpoint between them. Preemptions do not count. See
    docs/reliability.md#what-is-tried-again"""
    backoff: NonNegative = 1.0
    """Seconds before the second retry in a row; the first comes at once, each further one waits twice as long."""
    backoff_max: NonNegative = 60.0
    """The longest wait, in seconds."""


class Watchdog(Strict):
    stall: Annotated[Float, Field(gt=0)] = 300.0
    """Seconds in which some worker must make progress: a micro-batch, or a batch of an evaluation."""
    start: Annotated[Float, Field(gt=0)] = 1800.0
    """The same before the first step is done."""


class Spike(Strict):
    window: Annotated[int, Field(ge=4)] = 50
    """Steps whose losses say what is usual."""
    threshold: Annotated[Float, Field(gt=0)] = 8.0
    """Robust standard deviations above their median, from which on a loss is a spike."""
    action: Literal["warn", "rollback"] = "warn"
    """`warn`: say so and go on; `rollback`: go back to the checkpoint before it, and leave the samples at fault out."""
