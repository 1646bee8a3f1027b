"""Collects the differences of `heliostat check --numerics`, one row per kind, and defines the limits of these differences.

Differences are relative norms: the norm of the difference, divided by the norm of the result of one plain process in fp32. Each
step begins from the engine's own weights. So nothing accumulates over steps, and a limit covers one step's rounding. The limits
are about ten times the differences of healthy jobs, and are smaller than the differences that any fault with an effect on
training would cause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class NumericFault:
    """Describes a difference beyond its limit. `what`: the kind of difference, such as gradient. `step`: counted from 1. `name`:
    the parameter. `cause`: empty if unknown."""

    what: str
    step: int
    name: str
    difference: float
    cause: str = ""

    def __str__(self) -> str:
        where = f"{self.name}, " if self.name else ""
        return f"{self.what}: {where}step {self.step}: differs by {self.difference:.2g}{f': {self.cause}' if self.cause else ''}"


@dataclass
class DifferenceRow:
    """Collects the differences of one kind: the worst difference, and those beyond the limit."""

    what: str
    limit: float
    worst: float = 0.0
    where: str = ""
    count: int = 0
    faults: list[NumericFault] = field(default_factory=list)

    def add(self, step: int, name: str, difference: float, cause: Callable[[], str] = lambda: "") -> None:
        self.count += 1
        if not difference <= self.worst or not self.where:
            self.worst, self.where = difference, f"{name}, step {step}" if name else f"step {step}"
        if not difference <= self.limit:
            self.faults.append(NumericFault(self.what, step, name, difference, cause()))

    def dump(self) -> dict[str, object]:
        return asdict(self)

    @staticmethod
    def parse(raw: dict[str, Any]) -> DifferenceRow:
        return DifferenceRow(**{**raw, "faults": [NumericFault(**fault) for fault in raw["faults"]]})


@dataclass(frozen=True)
class Thresholds:
    loss: float
    """Tolerance of a step's loss, as a relative difference."""
    gradient: float
    """Tolerance of each parameter's gradient, as a relative difference of norms."""
    floor: float
    """Smallest norm by which a gradient's difference is divided, as a share of the norm expected from the parameter's size. Some
    gradients are zero except for rounding. For example, attention cancels the gradients of key biases."""
    update: float
    """Tolerance of each parameter's update, compared with torch's optimizer on the engine's gradient. Updates are fp32 at every
    precision, like the master weights and optimizer state."""
    resumed: float
    """Tolerance of the losses that another configuration computes after the checkpoint. The comparison is with the losses of the
    workers that saved the checkpoint."""


UPDATE = 1e-3  # clipping divides by a norm that was summed in another order; small updates change only the last bits of weights
LIMITS = {
    # another order of sums: about 1e-7 per sum, over some hundred sums
    "fp32": Thresholds(loss=1e-5, gradient=1e-3, floor=1e-2, update=UPDATE, resumed=1e-5),
    # 8 bits of mantissa: an error of up to 4e-3 per product; a router may choose another expert
    "bf16": Thresholds(loss=2e-2, gradient=2.5e-1, floor=1e-1, update=UPDATE, resumed=2e-2),
    # 11 bits of mantissa: an error of 5e-4 per product; scaled gradients below 6e-8 become zero
    "fp16": Thresholds(loss=5e-3, gradient=1e-1, floor=1e-1, update=UPDATE, resumed=5e-3),
}
