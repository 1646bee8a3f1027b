"""Defines types of fields that several sections of the job file share: numbers within bounds, and names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from heliostat.schema import Float
from heliostat.text import NAME, printable


@dataclass(frozen=True)
class Filled:
    """Marks a field that the module `defaults` fills in if a job file doesn't set it. `rule`: the rule for the value, for the
    reference page."""

    rule: str


LARGEST = 2**32  # maximum of counts such as steps; a larger count is a typing mistake
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that every random number generator accepts
Name = Annotated[str, Field(pattern=NAME)]


def _experiment(name: str) -> str:
    """Validates an experiment's name more strictly than MLflow, because the name may become a folder, and terminals and pages
    show it."""
    parts = name.removeprefix("/").split("/")  # names on Databricks begin with a slash
    if not name.strip() or len(name) > 250 or printable(name) != name or "\\" in name or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"{printable(name[:60])!r} isn't a valid experiment name. Use up to 250 characters, without control "
            "characters or backslashes; no part between slashes may be empty, . or .."
        )
    return name


Experiment = Annotated[str, AfterValidator(_experiment)]


def _actor_gpus(value: float) -> float:
    """Validates the number of GPUs of an actor: above 1, Ray gives an actor only whole GPUs."""
    if value > 1 and value % 1:
        raise ValueError(f"{value:g} isn't a whole number of GPUs. Use at most 1, or a whole number such as {math.ceil(value)}")
    return value


ActorGpus = Annotated[Float, Field(ge=0), AfterValidator(_actor_gpus)]


def divisors(number: int) -> list[int]:
    """Lists a number's divisors in ascending order. For a number above LARGEST, lists only 1, because trial division would take
    too long."""
    if number > LARGEST:
        return [1]
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]
