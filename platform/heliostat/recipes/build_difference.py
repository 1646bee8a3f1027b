"""Compares the results of a recipe's `build` with and without weights. Finds differences other than the weights themselves.

The `build` of a custom recipe may read the new weights, copy them, or draw more random numbers. The recipe may store the results
in an attribute of the model or the recipe, in a list, or in a closure. Such results would differ between workers.
"""

from __future__ import annotations

import re
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from heliostat.recipes.protocol import Recipe

ALIKE = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size)
HOOKS = re.compile(r"_hooks(_with_kwargs|_always_called)?$")


def find(right: tuple[Recipe, torch.nn.Module], other: tuple[Recipe, torch.nn.Module]) -> str:
    """Describes the first difference between two recipes and their models. Returns "" if they are equal. The values of parameters
    and registered buffers aren't compared."""
    if _parameters(right[1]) != _parameters(other[1]):
        return "its parameters"
    if _buffers(right[1]) != _buffers(other[1]):
        return "its buffers"
    compare = _Comparison(right[1], other[1])
    return compare.of(right[1], other[1], "model") or compare.of(vars(right[0]), vars(other[0]), "recipe")


def _parameters(model: torch.nn.Module) -> list[tuple[object, ...]]:
    """Describes the parameters of a model. Tied parameters appear under each of their names."""
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    named = model.named_parameters(remove_duplicate=False)
    return [(name, first[id(p)], tuple(p.shape), p.dtype, p.requires_grad) for name, p in named]


def _buffers(model: torch.nn.Module) -> list[tuple[object, ...]]:
    return [(name, tuple(b.shape), b.dtype) for name, b in model.named_buffers(remove_duplicate=False)]


class _Comparison:
    def __init__(self, right: torch.nn.Module, other: torch.nn.Module) -> None:
        self.names = [{id(t): name for name, t in [*m.named_parameters(), *m.named_buffers()]} for m in (right, other)]
        self.seen = set[tuple[int, int]]()
        self.kept = list[object]()  # compared objects stay alive: Python may reuse the id of a freed object

    def of(self, right: Any, other: Any, where: str = "") -> str:
        """Compares two objects. Returns the path to the first difference, such as `.layers[0]`, or "" if both are equal."""
        if right is other or (id(right), id(other)) in self.seen:
            return ""
        if type(right) is not type(other):
            return where
        if isinstance(right, ALIKE):
            return "" if right == other or right != right else where
        self.seen.add((id(right), id(other)))
        self.kept.append((right, other))
        if isinstance(right, torch.Tensor) and id(right) in self.names[0]:
            return "" if self.names[0][id(right)] == self.names[1].get(id(other)) else where
        if isinstance(right, torch.Tensor):
            return "" if right.device == other.device and torch.equal(right, other) else where
        if isinstance(right, np.ndarray) and right.dtype != object:
            return "" if np.array_equal(right, other, equal_nan=right.dtype.kind in "fc") else where
        parts, its = _parts(right), _parts(other)
        if parts.keys() != its.keys():
            return where
        return next((difference for step in parts if (difference := self.of(parts[step], its[step], where + step))), "")


def _parts(thing: object) -> dict[str, object]:
    """Returns the attributes or items of an object. Each key is the path to a part, such as `.name` or `[0]`."""
    if isinstance(thing, dict):
        return {f"[{key!r}]": value for key, value in thing.items()}
    if isinstance(thing, set | frozenset):
        thing = sorted(thing, key=str)
    if isinstance(thing, list | tuple | np.ndarray):
        return {f"[{i}]": one for i, one in enumerate(thing)}
    if isinstance(thing, FunctionType):
        return {f" ({i})": cell.cell_contents for i, cell in enumerate(thing.__closure__ or ())}
    if isinstance(thing, MethodType):
        return {".__self__": thing.__self__}
    if isinstance(thing, partial):
        return {".func": thing.func, ".args": thing.args, ".keywords": thing.keywords}
    if isinstance(thing, ModuleType):
        return {}
    attributes = {f".{name}": value for name, value in getattr(thing, "__dict__", {}).items()}
    if isinstance(thing, torch.nn.Module):  # the keys of hooks differ: torch counts all hooks of a process
        hooks = {way: list(value.values()) for way, value in attributes.items() if HOOKS.search(way) and isinstance(value, dict)}
        return attributes | hooks
    return attributes
