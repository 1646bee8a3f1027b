"""Builds the parts of a checkpoint's index that a test doesn't check."""

from __future__ import annotations

from typing import Any

from heliostat.checkpoint.layout import FORMAT
from heliostat.data.dataset import DataPlan
from heliostat.data.mixing import Shape

DATA = DataPlan(("a",), ("d",), ((0, (1.0,)),), (None,), 64, 1, 0.0, Shape(8, 4, 2, 16)).dump()


def facts(**given: Any) -> dict[str, Any]:
    """Returns the facts that a save records in a checkpoint; `given` overrides them."""
    saved = index(int(given.get("optimizer_steps", 0)), **given)
    return {k: v for k, v in saved.items() if k not in ("format", "step", "shards", "tensors")}


def index(step: int, **facts: Any) -> dict[str, Any]:
    """Builds the index of a checkpoint without tensors, saved after `step`; `facts` override the defaults."""
    return {
        "format": FORMAT, "step": step, "name": "small", "world_size": 1, "zero_stage": 1, "optimizer_steps": step, "job": {},
        "data": DATA, "data_digest": "", "receipt": {"steps": step, "chain": ""}, "bad_samples": 0, "metrics": {}, "written": 0.0,
        "shards": [], "tensors": {}, **facts,
    }  # fmt: skip
