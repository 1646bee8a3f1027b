"""Collects the differences that were found, a row for each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from heliostat.config.fields import Json


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

    def dump(self) -> dict[str, Json]:
        return asdict(self)

    @staticmethod
    def parse(raw: dict[str, Json]) -> DifferenceRow:
        return DifferenceRow(**{**raw, "faults": [NumericFault(**fault) for fault in raw["faults"]]})
