"""Defines the types of fields that several sections of the job file have: numbers within bounds, and names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from heliostat.schema import Float
from heliostat.text import printable


@dataclass(frozen=True)
class Filled:
    """Marks a field that `defaults` fills in where a job file leaves it out, by a rule that this names."""

    rule: str


LARGEST = 2**32  # of what is counted by the step; what is beyond it is a slip of the finger
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every random number generator takes
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


def _experiment(name: str) -> str:
    """Validates an experiment's name: MLflow takes any; ours may become a folder, and stands in a terminal and a page."""
    parts = name.removeprefix("/").split("/")  # Databricks' begin with one
    if not name.strip() or len(name) > 250 or printable(name) != name or "\\" in name or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"{printable(name[:60])!r} is no experiment's name: up to 250 characters, none of them a control character or \\, "
            "and no part between slashes empty, . or .."
        )
    return name


Experiment = Annotated[str, AfterValidator(_experiment)]


def divisors(number: int) -> list[int]:
    """Lists a number's divisors, ascending; only 1 for a number beyond LARGEST, whose square root is too far to try."""
    if number > LARGEST:
        return [1]
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]
