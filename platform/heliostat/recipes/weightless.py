"""Builds a model without memory for its weights, which another worker or a folder fills later.

During construction, parameters have only shapes (torch's meta device); buffers are real. `put` then sets a parameter's values
on the training device, in the training precision. A parameter stays the same object, so references to it (tied weights,
optimizers) stay valid.
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
    """Locates the folder with the values of a module's tensors, by their names in the module."""

    module: torch.nn.Module
    folder: Path
    tensors: dict[str, torch.Tensor]


_building = ContextVar[list[Pretrained] | None]("weightless", default=None)


def wanted() -> bool:
    """Checks whether models are built without weights now; a recipe then loads none."""
    return _building.get() is not None


def comes_from(module: torch.nn.Module, folder: str | Path) -> None:
    """Records that a module's weights, as they are now, come from a folder. Does nothing if the module was built with weights."""
    if (noted := _building.get()) is not None:
        noted.append(Pretrained(module, Path(folder), dict(module.state_dict(keep_vars=True))))


@contextmanager
def building() -> Iterator[list[Pretrained]]:
    """Makes modules that are built inside register parameters without memory; yields the list of folders that recipes record."""
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
    """Removes a parameter's values; its shape and attributes stay."""
    put(param, torch.empty_like(param, device="meta"))


def empty_all(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Removes the values of all parameters; yields each parameter that the model then has, and its values."""
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
