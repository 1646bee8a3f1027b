"""Holds what `heliostat serve` is told."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from heliostat.errors import ConfigError
from heliostat.schema import Float, Strict


class Options(Strict):
    """Describes an endpoint."""

    port: int = Field(8000, ge=1, le=65535)
    replicas: tuple[int, int] = (1, 1)
    """At least and at most so many."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What writes; auto is vllm where it can be."""
    batch: int = Field(16, ge=1, le=4096)
    """Prompts that a replica steps together."""
    body_bytes: int = Field(1 << 20, ge=1)
    max_tokens: int = Field(1024, ge=1)
    """Tokens of an answer, at most."""
    at_once: int = Field(256, ge=0)
    """Requests of a key at a time; 0 is no limit."""
    a_minute: int = Field(0, ge=0)
    """Requests of a key in a minute; 0 is no limit."""
    deadline_s: Float = Field(300.0, gt=0)
    """For an answer as a whole."""
    poll_s: Float = Field(2.0, gt=0)
    """Between two looks at the alias."""


def replicas(text: str) -> tuple[int, int]:
    """Reads a number of replicas, as 2 or 1..4; ConfigError if it is none."""
    match = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError(f"--replicas: {text!r} is no number of replicas; give one, as 2, or a range, as 1..4")
    return least, most
