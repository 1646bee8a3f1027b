"""Builds a model without memory for its weights, which another worker or a folder then gives their values.

Parameters have shapes alone (torch's meta device) while the model is built; buffers are real. `put` then gives a parameter its
values on the device that trains, in the precision that trains. A parameter stays the same object throughout, so what refers to it
(tied weights, optimizers) keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Pretrained:
    """Locates the folder that has the values of a module's tensors, here by their names in the module."""

    module: torch.nn.Module
    folder: Path
    tensors: dict[str, torch.Tensor]


_building = ContextVar[list[Pretrained] | None]("weightless", default=None)


def wanted() -> bool:
    """Checks whether a model is built without weights now: a recipe then loads none."""
    return _building.get() is not None


def comes_from(module: torch.nn.Module, folder: str | Path) -> None:
    """Notes that a module, as it is now, has its weights from a folder. Does nothing where the module was built with weights."""
    if (noted := _building.get()) is not None:
        noted.append(Pretrained(module, Path(folder), dict(module.state_dict(keep_vars=True))))


@contextmanager
def building() -> Iterator[list[Pretrained]]:
    """Makes modules that are built inside register parameters without memory; yields the list of folders that recipes note."""
    register = torch.nn.Module.register_parameter

    def without(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(module, name, param)
        if type(param) is torch.nn.Parameter and not param.is_meta:
            empty(param)

    noted: list[Pretrained] = []
    token = _building.set(noted)
    torch.nn.Module.register_parameter = without  # type: ignore[method-assign,assignment]
    try:
        yield noted
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        _building.reset(token)


def empty(param: torch.nn.Parameter) -> None:
    """Takes a parameter's values away; its shape and its attributes stay."""
    put(param, torch.empty_like(param, device="meta"))


def empty_all(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Takes the values of all parameters away; yields each parameter that the model then has, and its values."""
    for param in list(model.parameters()):
        values = param.detach()
        try:
            empty(param)
            yield param, values
        except RuntimeError:  # a graph of autograd refers to it
            placeholder = torch.nn.Parameter(values.to("meta"), requires_grad=param.requires_grad)
            placeholder.__dict__.update(param.__dict__)
            for module in model.modules():
                module._parameters.update({name: placeholder for name, p in module._parameters.items() if p is param})
            yield placeholder, values


def put(param: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Gives a parameter values on any device, of any type and shape; hooks on its gradient are lost."""
    replacement = torch.nn.Parameter(values.detach(), requires_grad=param.requires_grad)
    replacement.__dict__.update(param.__dict__)
    torch.utils.swap_tensors(param, replacement)
