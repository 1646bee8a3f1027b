"""Checkpoints activations: keeps only the input of a layer, and recomputes the layer in the backward pass.

`train.activation_checkpointing` selects all layers, or the first N. The layers after the first N keep all their activations. The
backward pass runs these layers first, and releases their activations before the recomputation of the first N layers. So these
activations share memory with the recomputation of a layer.

With `train.activation_offload`, the layers' inputs are in host memory until the backward pass. With `selective`, all layers keep
their expensive outputs (`recipes.text.selective`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from heliostat.config.train_section import SELECTIVE
from heliostat.data.device_streams import HostTensors
from heliostat.errors import ConfigError
from heliostat.parallel import tiny
from heliostat.parallel.language_model import LanguageModel
from heliostat.recipes.text import selective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOME, OFFLOAD = "train.activation_checkpointing", "train.activation_offload"


Which = bool | int | Literal["selective"]


def use(model: PreTrainedModel, which: Which, offload: bool) -> None:
    """Turns on activation checkpointing for a transformers model: for all layers, the first N layers, or all layers
    selectively."""
    how = {"context_fn": selective.contexts} if which == SELECTIVE else {}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # about the method's name; its new name needs a version after transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **how})
    if (which is True and not offload) or isinstance(which, str):
        return
    host = HostTensors()
    for place, layer in enumerate(layers(model)):
        layer.gradient_checkpointing = which is True or place < which
        if offload:
            layer._gradient_checkpointing_func = OnHost(layer._gradient_checkpointing_func, host)


def layers(model: torch.nn.Module) -> list[Any]:
    """Lists the layers that transformers checkpoints one by one, in the model's order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


class OnHost:
    """Checkpoints a layer like `checkpoint`, but keeps the layer's input in host memory. A checkpointed layer keeps nothing else,
    so only the input is copied. On a CPU, the copy is in the same memory as the original."""

    def __init__(self, checkpoint: Callable[..., object], host: HostTensors) -> None:
        """Prepares the checkpointing. `host`: shared by all layers of a model. Inputs are copied in the order of the layers."""
        self.checkpoint, self.host = checkpoint, host
        self.copied = 0

    def __call__(self, layer: Callable[..., object], *args: object) -> object:
        self.copied += sum(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        with self.host:
            return self.checkpoint(layer, *args)


# checks of an architecture --------------------------------------------------------------------------------------------


def require(recipe: LanguageModel) -> None:
    """Raises ConfigError unless the model has enough layers to checkpoint, and supports selective checkpointing or offload if
    the job asks for it."""
    which, kind = recipe.checkpointing, recipe.config.model_type
    if which is True and not recipe.offload:
        return
    whole = copy.copy(recipe)
    whole.checkpointing = False  # transformers rejects checkpointing for some architectures
    with torch.device("meta"):
        count = len(layers(whole.build()))
    key = OFFLOAD if which is True else SOME
    if not count:
        raise ConfigError(f"{key}: transformers doesn't checkpoint the layers of {kind!r} one by one. Set {_plainly(key)}")
    if which == SELECTIVE:
        if fault := tiny.tried(recipe, _differs):
            raise ConfigError(f"{SOME}: {kind!r} doesn't support selective checkpointing: {fault}. Set {_plainly(key)}")
    elif isinstance(which, int) and which is not True and which > count:
        raise ConfigError(
            f"{SOME}: {which} must be below the number of layers of {kind!r}, which is {count}. "
            f"Set this key to true, or to {count - 1} or less"
        )
    if recipe.offload and (fault := tiny.tried(recipe, _fault)):
        raise ConfigError(f"{OFFLOAD}: {kind!r} doesn't support activation offload: {fault}. Set this key to false")


def _plainly(key: str) -> str:
    return "this key to true or false" if key == SOME else "this key to false"


def _differs(small: LanguageModel) -> str:
    """Compares the loss and the gradient of a small model with and without selective checkpointing. Returns "" if they are
    bitwise equal, else the difference."""
    wrong = []
    ways: tuple[Which, ...] = (False, "selective")
    for small.checkpointing in ways:
        torch.manual_seed(0)
        model = small.build()
        loss = small.loss(model, small.batch(tiny.tokens(small))).sum
        loss.backward()
        wrong.append(torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]))
    return "" if torch.equal(*wrong) else "the gradient differs from the gradient without checkpointing"


def _fault(small: LanguageModel) -> str:
    """Tests with a small model whether the input of each layer was copied to host memory. Returns "" if all inputs were copied,
    else the reason."""
    small.checkpointing = True
    model = small.build()
    small.loss(model, small.batch(tiny.tokens(small))).sum.backward()
    copied = [layer._gradient_checkpointing_func.copied for layer in layers(model)]
    return "" if all(copied) else "the layers take their input as a keyword argument, so the input stays on the device"
