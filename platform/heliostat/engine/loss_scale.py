"""Saves and restores fp16's dynamic loss scale, which is part of a run's state.

Gradients are computed of the loss times a scale, which halves when they overflow (that step is skipped, and counted) and doubles
after a while without overflow (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). Begun anew on resume, it would skip
steps until it was found again.
"""

from __future__ import annotations

from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read(engine: Any) -> dict[str, float] | None:
    """Reads the state of the dynamic loss scale for a checkpoint; None where there is no loss scale, or it is fixed."""
    scaler = _scaler(engine)
    return {k: getattr(scaler, k) for k in FIELDS} if scaler else None


def write(engine: Any, held: dict[str, float] | None) -> str | None:
    """Restores the dynamic loss scale from a checkpoint; returns a notice if the engine needs one and there is none."""
    scaler = _scaler(engine)
    if scaler and not held:
        return f"the checkpoint holds no fp16 loss scale: it begins anew at {scaler.cur_scale:g}, and steps may be skipped"
    for key, value in (held or {}).items() if scaler else ():
        setattr(scaler, key, value)
    return None


def _scaler(engine: Any) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
