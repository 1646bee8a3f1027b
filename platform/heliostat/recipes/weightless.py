"""Builds a model without memory for its weights. Another worker or a folder provides the weights later.

During construction, parameters have only shapes (torch's meta device), while buffers have values. Later, `put` sets a parameter's
values on the training device, in the training precision. A parameter stays the same object, so references to it (tied weights,
optimizers) stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from heliostat.recipes import partitioning


@dataclass(frozen=True)
class Pretrained:
    """Describes a folder that contains the values of a module's tensors. `tensors`: the module's tensors, by name."""

    module: torch.nn.Module
    folder: Path
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Computed:
    """Describes a tensor whose first values `make` computes: from nothing, or from the values of another tensor (`source`)."""

    tensor: torch.Tensor
    make: Callable[..., torch.Tensor]
    source: torch.Tensor | None = None


_building = ContextVar[list[Pretrained | Computed] | None]("weightless", default=None)


def wanted() -> bool:
    """Returns whether models are being built without weights now. If true, a recipe must not load weights."""
    return _building.get() is not None


def comes_from(module: torch.nn.Module, folder: str | Path) -> None:
    """Records that a module's current weights come from a folder. Does nothing outside `building`, where modules are built with
    weights."""
    if (noted := _building.get()) is not None:
        noted.append(Pretrained(module, Path(folder), dict(module.state_dict(keep_vars=True))))


def starts_as(parameter: torch.Tensor, make: Callable[..., torch.Tensor], source: torch.Tensor | None = None) -> None:
    """Sets a parameter's first values: those that `make()` returns, or `make(source)` with the complete values of `source`.

    Inside `building`, only records the function, because the parameter has no memory yet.
    """
    if (noted := _building.get()) is not None:
        noted.append(Computed(parameter, make, source))
    elif not parameter.is_meta:
        with torch.no_grad(), nullcontext() if source is None else partitioning.whole(source):
            parameter.copy_(make(*([] if source is None else [source.detach()])))


@contextmanager
def building() -> Iterator[list[Pretrained | Computed]]:
    """Makes modules that are built inside the context register parameters without memory. Yields a list. Recipes add the folders
    with the model's weights to this list, and functions that compute the values of other parameters."""
    register = torch.nn.Module.register_parameter

    def without(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(module, name, param)
        if type(param) is torch.nn.Parameter and not param.is_meta:
            empty(param)

    noted: list[Pretrained | Computed] = []
    token = _building.set(noted)
    torch.nn.Module.register_parameter = without  # type: ignore[method-assign,assignment]
    try:
        yield noted
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        _building.reset(token)


def empty(param: torch.nn.Parameter) -> None:
    """Removes a parameter's values. The parameter keeps its shape and attributes."""
    put(param, torch.empty_like(param, device="meta"))


def empty_all(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Removes the values of all parameters. Yields each parameter of the model with its former values."""
    for param in list(model.parameters()):
        values = param.detach()
        try:
            empty(param)
            yield param, values
        except RuntimeError:  # an autograd graph refers to the parameter
            placeholder = torch.nn.Parameter(values.to("meta"), requires_grad=param.requires_grad)
            placeholder.__dict__.update(param.__dict__)
            for module in model.modules():
                module._parameters.update({name: placeholder for name, p in module._parameters.items() if p is param})
            yield placeholder, values


def put(param: torch.nn.Parameter, values: torch.Tensor) -> None:
    """Sets a parameter's values. The new values may have another device, dtype, and shape. The hooks on the parameter's gradient
    are lost."""
    replacement = torch.nn.Parameter(values.detach(), requires_grad=param.requires_grad)
    replacement.__dict__.update(param.__dict__)
    torch.utils.swap_tensors(param, replacement)
