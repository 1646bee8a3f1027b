"""Finds stages by their names in pipeline files. Each module of `heliostat.curation.stages` defines the stage with the module's
name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from pydantic import ValidationError

from heliostat.curation.stage import Stage
from heliostat.schema import absent, explain, nearest
from heliostat.text import brief

STAGES = "heliostat.curation.stages"  # a module is imported when a pipeline uses its stage


def names() -> list[str]:
    return sorted(
        m.name
        for m in pkgutil.iter_modules([str(Path(__file__).parent / "stages")])
        if not m.name.startswith("_") and not m.ispkg
    )


def find(name: str) -> type[Stage]:
    """Finds a stage's class. If no stage has this name, raises a ValueError with the nearest name."""
    if name not in names():
        raise ValueError(f"{name!r} isn't a stage{nearest(name, names())}")
    module = importlib.import_module(f"{STAGES}.{name}")
    (class_name,) = (
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Stage) and c.__module__ == module.__name__
    )
    return class_name


def require_list(raw: object) -> object:
    """Raises a ValueError with the form of a list for a single stage, such as `stages: {stage: c4}` or `stages: c4`."""
    if isinstance(raw, dict | str):
        name = raw.get("stage", "NAME") if isinstance(raw, dict) else raw
        raise ValueError(f"expected a list, got {brief(repr(raw))}. Write stages: [{{stage: {brief(name)}}}]")
    return raw


def parse(raw: object) -> Stage:
    """Makes a stage from its entry in a pipeline file, `{stage: NAME, KEY: VALUE}`. ValueError for an invalid entry."""
    if isinstance(raw, Stage):
        return raw
    if isinstance(raw, dict) and "stage" not in raw:
        raise ValueError(absent("stage", next((key for key in raw if key in names()), "NAME")))
    if isinstance(raw, str):
        raise ValueError(f"expected a mapping, got {brief(repr(raw))}. Write {{stage: {brief(raw)}}}")
    if not isinstance(raw, dict) or not isinstance(raw["stage"], str):
        raise ValueError(f"{raw!r} isn't a stage. Write {{stage: NAME, KEY: VALUE}}")
    cls = find(raw["stage"])
    try:
        return cls.model_validate({key: value for key, value in raw.items() if key != "stage"})
    except ValidationError as e:
        raise ValueError(f"{raw['stage']}: {'; '.join(explain(e, cls))}") from e
