"""Builds a model without memory for its weights, where another worker's weights will be put into it.

Parameters have shapes alone (torch's meta device) while the model is built; buffers are real. `materialize` then gives them
memory on the device that trains, in the precision that trains, so no copy in fp32 is ever in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_building = ContextVar("weightless", default=False)


def wanted() -> bool:
    """Tells whether a model is built without weights now: a recipe then loads none."""
    return _building.get()


@contextmanager
def building() -> Iterator[None]:
    """Makes modules that are built inside register parameters without memory."""
    register = torch.nn.Module.register_parameter

    def without(module: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(module, name, param)
        if type(param) is torch.nn.Parameter and not param.is_meta:
            shape_only = torch.nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            shape_only.__dict__.update(param.__dict__)
            module._parameters[name] = shape_only

    token = _building.set(True)
    torch.nn.Module.register_parameter = without  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        _building.reset(token)


def materialize(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives all that has shapes alone memory on the device, parameters in `dtype`, with no values yet."""
    made: dict[int, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}  # tied parameters stay one
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and param.is_meta:
                if id(param) not in made:
                    made[id(param)] = param, _unfilled(param, device, dtype)
                module._parameters[name] = made[id(param)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _unfilled(param: torch.nn.Parameter, device: torch.device, dtype: torch.dtype) -> torch.nn.Parameter:
    data = torch.empty(param.shape, dtype=dtype if param.is_floating_point() else param.dtype, device=device)
    made = torch.nn.Parameter(data, requires_grad=param.requires_grad)
    made.__dict__.update(param.__dict__)
    return made
