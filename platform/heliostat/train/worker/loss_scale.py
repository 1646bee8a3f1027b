"""fp16's dynamic loss scale: part of the state of a run, and what it costs is counted.

Gradients are computed of the loss times a scale, which halves when they overflow (that step is skipped) and doubles after a while
without (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). Begun anew on resume, it would skip steps until it was found.
"""

from __future__ import annotations

from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read(engine: Any) -> dict[str, float] | None:
    """What a checkpoint holds of it; None where there is none, or it is fixed."""
    scaler = _scaler(engine)
    return {k: getattr(scaler, k) for k in FIELDS} if scaler else None


def write(engine: Any, held: dict[str, float] | None) -> str | None:
    """Goes on with what a checkpoint holds; what a person should know if that is nothing and the engine wants it."""
    scaler = _scaler(engine)
    if scaler and not held:
        return f"the checkpoint holds no fp16 loss scale: it begins anew at {scaler.cur_scale:g}, and steps may be skipped"
    for key, value in (held or {}).items() if scaler else ():
        setattr(scaler, key, value)
    return None


def _scaler(engine: Any) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
