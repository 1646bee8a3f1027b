"""Defines the type of an interval of sampling times. This module needs neither torch nor diffusers."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from heliostat.schema import Float


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"expected two ascending numbers from 0 (image) to 1 (noise), got {low:g} and {high:g}")
    return interval


Interval = Annotated[tuple[Float, Float], Field(strict=False), AfterValidator(_ordered)]  # not strict: YAML and JSON have lists
