"""Collects the differences that were found, a row for each kind, and holds their limits, and why these are what they are.

Differences are relative norms: the norm of what differs, over the norm of what one plain process computes in fp32. Each step
begins from the engine's own weights, so nothing adds up over steps, and a limit is that of one step's rounding. Limits are some
ten times above what healthy jobs show, and below any fault that training would feel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class NumericFault:
    """Describes a difference beyond its limit: of `what`, at `step` (from 1), in the parameter `name`; the cause, if known."""

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
    """Collects the differences of one kind: the worst of them, and those beyond the limit."""

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
    """Tolerance of a step's loss."""
    gradient: float
    """Tolerance of each parameter's gradient."""
    floor: float
    """Tolerance of a gradient's norm, as a share of its expected size in the whole gradient: some gradients, such as those of
    key biases, which attention cancels, are zero except for rounding."""
    update: float
    """Tolerance of each parameter's update against torch's optimizer, for the engine's gradient. In fp32 at every precision,
    like the master weights and optimizer state."""
    resumed: float
    """Tolerance of the losses after a checkpoint with another configuration, against those of the workers that saved it."""


UPDATE = 1e-3  # clipping divides by a norm that was summed in another order, and small updates round in the weight's last bits
LIMITS = {
    # sums in another order: some 1e-7 a sum, and some hundred of them deep
    "fp32": Thresholds(loss=1e-5, gradient=1e-3, floor=1e-2, update=UPDATE, resumed=1e-5),
    # 8 bits of mantissa: each product is off by up to 4e-3; a router's choice may tip over
    "bf16": Thresholds(loss=2e-2, gradient=2.5e-1, floor=1e-1, update=UPDATE, resumed=2e-2),
    # 11 bits: 5e-4, and gradients that are lost below 6e-8 of the loss's scale
    "fp16": Thresholds(loss=5e-3, gradient=1e-1, floor=1e-1, update=UPDATE, resumed=5e-3),
}
