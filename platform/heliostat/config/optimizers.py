"""Defines the optimizers that `train.optimizer.name` may name: one class each, which holds its keys in the job, the state that it
keeps of every parameter, and how torch builds it. Checkpoints, the plan and the checks follow from these;
docs/guides/optimizer.md adds one.

Importing this costs nothing: torch is imported where an optimizer is built. An optimizer belongs here if it is elementwise: an
element of a parameter is updated from its own gradient and state alone. ZeRO cuts parameters, flat and end to end, anywhere into
slices that the workers update apart, and a checkpoint of one cut is loaded at another. `REFUSED` names some that are not so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from heliostat.config.schema import Float, Strict
from heliostat.errors import ConfigError

if TYPE_CHECKING:
    import torch

NonNegative = Annotated[Float, Field(ge=0)]
Rate = Annotated[Float, Field(ge=0, lt=1)]
DEFAULT = "adamw"  # what recorded jobs of before there were others do not name
STATE_BYTES = 4  # of an element of each state: fp32, as the masters are


class Optimizer(Strict):
    """Defines what every optimizer has."""

    name: str
    lr: Annotated[Float, Field(gt=0)]
    """The peak learning rate, which the schedule scales."""
    weight_decay: NonNegative

    @property
    def state(self) -> tuple[str, ...]:
        """Returns the names, torch's own, of the optimizer state: fp32 tensors of a parameter's shape, kept for every parameter.
        They begin as zeros; checkpoints hold them by these names."""
        raise NotImplementedError

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Builds torch's optimizer for parameter groups, which hold `params` and `weight_decay`."""
        raise NotImplementedError


class AdamW(Optimizer):
    """Optimizes by Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """The optimizer's algorithm."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay rates of the first and the second moment."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to the second moment's root."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, of matrices only: vectors (biases, norms) have none."""

    @property
    def state(self) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        betas = (self.betas[0], self.betas[1])
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)


class Sgd(Optimizer):
    """Optimizes by stochastic gradient descent, with momentum (Sutskever et al. 2013) or, if that is 0, without any state."""

    name: Literal["sgd"] = "sgd"
    """The optimizer's algorithm."""
    momentum: Rate = 0.9
    """Decay rate of the gradients' running sum; 0 keeps none, and no state."""
    nesterov: bool = False
    """Looks ahead along the momentum, which must not be 0."""
    weight_decay: NonNegative = 0.0
    """Added to the gradient, times the weight; of matrices only."""

    @model_validator(mode="after")
    def _consistent(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs momentum; set momentum above 0, or nesterov to false")
        return self

    @property
    def state(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)


class RmsProp(Optimizer):
    """Optimizes by gradients over the root of a running mean of their squares (Tieleman & Hinton 2012, lecture 6.5)."""

    name: Literal["rmsprop"] = "rmsprop"
    """The optimizer's algorithm."""
    alpha: Rate = 0.99
    """Decay rate of the squares' mean."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to the root."""
    weight_decay: NonNegative = 0.0
    """Added to the gradient, times the weight; of matrices only."""

    @property
    def state(self) -> tuple[str, ...]:
        return ("square_avg",)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.RMSprop(groups, lr=self.lr, alpha=self.alpha, eps=self.eps)  # fused there is none


REGISTRY: dict[str, type[Optimizer]] = {kind.model_fields["name"].default: kind for kind in (AdamW, Sgd, RmsProp)}
REFUSED = {
    **dict.fromkeys(
        ("adafactor", "muon", "shampoo", "soap", "lamb", "lars"), "looks at whole tensors, and ZeRO gives workers slices"
    ),
    "adagrad": "is made anew by DeepSpeed, which then steps only one group of the parameters",
    "lbfgs": "asks for several losses in a step",
}


def _refuse(value: Any) -> Any:
    """Refuses a known optimizer that is not supported, with the reason."""
    name = value.get("name") if isinstance(value, dict) else None
    if isinstance(name, str) and (why := REFUSED.get(name.lower())):
        raise ValueError(f"name {name!r} {why}; use one of {', '.join(REGISTRY)}")
    return value


def _name(value: Any) -> str:
    """Returns the optimizer's name as given; the default's where the value is no mapping, which that model then reports."""
    return str(value.get("name", DEFAULT) if isinstance(value, dict) else getattr(value, "name", DEFAULT))


if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    _KINDS = tuple(Annotated[kind, Tag(name)] for name, kind in REGISTRY.items())
    AnyOptimizer = Annotated[Union[_KINDS], Discriminator(_name), BeforeValidator(_refuse)]  # noqa: UP007 (made of a tuple)


def require_resumable(optimizer: Optimizer, recorded: dict[str, Any]) -> None:
    """Checks that a run whose checkpoints were made with the `recorded` keys can go on with this optimizer; ConfigError if not.
    The state that it keeps of every parameter must be what the checkpoints hold. Its other keys may change."""
    kind = REGISTRY.get(name := recorded.get("name", DEFAULT))
    held = kind.model_validate(recorded).state if kind else None
    if held == optimizer.state:
        return
    keeps = ", ".join(optimizer.state) or "nothing"
    holds = "what this heliostat does not know" if held is None else ", ".join(held) or "nothing"
    raise ConfigError(
        f"train.optimizer: {optimizer.name!r} keeps {keeps} of every parameter, and the run's checkpoints, made with {name!r}, "
        f"hold {holds}; keep {name!r} as it was, or start another run"
    )
