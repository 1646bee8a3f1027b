"""Defines the optimizers that `train.optimizer.name` accepts. Each class defines an optimizer's keys in the job, the names of the
optimizer's state, and the code that builds the optimizer in torch. Checkpoints, the plan, and the checks use these classes.
docs/guides/optimizer.md shows how to add an optimizer.

Importing this module doesn't import torch. Building an optimizer imports torch. An optimizer belongs here if its state is
elementwise. ZeRO flattens parameters, and cuts the result into slices at any element, and workers update the slices separately.
Checkpoints of one partition are loaded into another. An optimizer that needs complete tensors must assemble these tensors in its
step, as Muon does. `REFUSED` lists some optimizers that don't meet this requirement.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from heliostat.errors import ConfigError
from heliostat.schema import Float, Strict

if TYPE_CHECKING:
    import torch

NonNegative = Annotated[Float, Field(ge=0)]
Rate = Annotated[Float, Field(ge=0, lt=1)]
DEFAULT = "adamw"  # optimizer of old recorded jobs, which don't name an optimizer
STATE_BYTES = 4  # per element of each state tensor: fp32, like the master weights


class Optimizer(Strict):
    """Defines the keys and properties that every optimizer has."""

    name: str
    lr: Annotated[Float, Field(gt=0)]
    """Peak learning rate, which the schedule scales."""
    weight_decay: NonNegative

    copies: ClassVar[frozenset[str]] = frozenset()
    """Names of the state tensors that begin as a copy of the parameter. The other state tensors begin as zeros."""
    averages: ClassVar[bool] = False
    """Whether the optimizer averages the weights in its state `ema`. Evaluations and exports then use the average instead of the
    weights."""
    orthogonalizes: ClassVar[bool] = False
    """Whether hidden matrices have their own update rule, in separate parameter groups (`orthogonal`)."""

    @property
    @abstractmethod
    def state(self) -> tuple[str, ...]:
        """Returns torch's names of the optimizer state: fp32 tensors of a parameter's shape, one per name and parameter.
        Checkpoints use these names."""

    def kept(self, hidden_matrix: bool) -> tuple[str, ...]:
        """Returns the names of a parameter's optimizer state tensors, such as `exp_avg`. `hidden_matrix`: whether the parameter
        is a hidden matrix."""
        return self.state

    @abstractmethod
    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Builds torch's optimizer for parameter groups, which have `params` and `weight_decay`."""


class AdamW(Optimizer):
    """Optimizes by Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """Algorithm of the optimizer."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay rates of the first and the second moment."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Small constant that is added to the square root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices; vectors (biases, norms) have none."""

    @property
    def state(self) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        import torch

        betas = (self.betas[0], self.betas[1])
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)


class Sgd(Optimizer):
    """Optimizes by stochastic gradient descent with momentum (Sutskever et al. 2013). With momentum 0, this optimizer has no
    state."""

    name: Literal["sgd"] = "sgd"
    """Algorithm of the optimizer."""
    momentum: Rate = 0.9
    """Momentum: decay rate of the running sum of gradients; 0 keeps no optimizer state."""
    nesterov: bool = False
    """Nesterov momentum; needs a momentum above 0."""
    weight_decay: NonNegative = 0.0
    """L2 penalty of matrices: the gradient of each weight increases by this factor times the weight."""

    @model_validator(mode="after")
    def _consistent(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true needs momentum. Set momentum above 0, or nesterov to false")
        return self

    @property
    def state(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)


class RmsProp(Optimizer):
    """Optimizes by RMSProp: divides gradients by the root of a running mean of their squares (Tieleman & Hinton 2012, lecture
    6.5)."""

    name: Literal["rmsprop"] = "rmsprop"
    """Algorithm of the optimizer."""
    alpha: Rate = 0.99
    """Decay rate of the mean of squared gradients."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Constant that is added to the square root of the mean of squared gradients."""
    weight_decay: NonNegative = 0.0
    """L2 penalty of matrices: the gradient of each weight increases by this factor times the weight."""

    @property
    def state(self) -> tuple[str, ...]:
        return ("square_avg",)

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.RMSprop(groups, lr=self.lr, alpha=self.alpha, eps=self.eps)  # torch has no fused RMSprop


class Lion(Optimizer):
    """Optimizes by the sign of a momentum (Chen et al. 2023, arXiv 2302.06675). Needs about a fifth of AdamW's learning rate, and
    five times its weight decay."""

    name: Literal["lion"] = "lion"
    """Algorithm of the optimizer."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.99]
    """First: share of the momentum in an update. Second: decay rate of the momentum."""
    weight_decay: NonNegative = 0.5
    """Decoupled weight decay of matrices."""

    @property
    def state(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        from heliostat.optim import update_rules

        return update_rules.LionStep(groups, self.lr, (self.betas[0], self.betas[1]))


class ScheduleFree(Optimizer):
    """Optimizes by AdamW with an average of the weights instead of a schedule (Defazio et al. 2024, arXiv 2405.15682). Needs
    `train.schedule.name: constant`; a warm-up is allowed. Evaluation, sampling, and export use the average."""

    name: Literal["schedule_free"] = "schedule_free"
    """Algorithm of the optimizer."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """First: gradients are computed between the iterate and the average; this is the weight of the average. Second: decay rate of
    the second moment."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Small constant that is added to the square root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices."""
    copies: ClassVar[frozenset[str]] = frozenset({"z", "ema"})
    averages: ClassVar[bool] = True

    @property
    def state(self) -> tuple[str, ...]:
        return "exp_avg_sq", "z", "ema"

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        from heliostat.optim import update_rules

        return update_rules.ScheduleFreeStep(groups, self.lr, (self.betas[0], self.betas[1]), self.eps)


class Muon(Optimizer):
    """Optimizes hidden matrices along their orthogonalized momentum (Jordan et al. 2024). AdamW optimizes embeddings, output
    heads, convolutions (unless `model.orthogonal_filters` is set), norms, and biases. Complete matrices are orthogonalized at
    every ZeRO stage."""

    name: Literal["muon"] = "muon"
    """Algorithm of the optimizer."""
    momentum: Rate = 0.95
    """Decay rate of the gradients' running mean, for hidden matrices."""
    nesterov: bool = True
    """Nesterov momentum."""
    scale: Literal["adamw", "spectral"] = "adamw"
    """Scale of the learning rate for a matrix. `adamw`: updates are as large as AdamW's updates, so AdamW's learning rates fit.
    `spectral`: the square root of rows over columns, at least 1, as in Muon's publication; learning rates of about 0.02 fit."""
    newton_schulz: Literal["fp32", "bf16"] = "fp32"
    """Precision of the orthogonalization. `bf16` is faster on GPUs, but then updates differ slightly between worker counts."""
    adamw_lr: Annotated[Float, Field(gt=0)] | None = None
    """Peak learning rate of the parameters that AdamW trains. The schedule scales this rate like `lr`. Unset: `lr`."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay rates of the first and the second moment."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """AdamW's eps: small constant that is added to the square root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of all matrices: hidden matrices, embeddings, and heads."""
    orthogonalizes: ClassVar[bool] = True

    @property
    def state(self) -> tuple[str, ...]:
        return "momentum_buffer", "exp_avg", "exp_avg_sq"

    def kept(self, hidden_matrix: bool) -> tuple[str, ...]:
        return self.state[:1] if hidden_matrix else self.state[1:]

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        import torch

        from heliostat.optim import muon

        rate = self.lr if self.adamw_lr is None else self.adamw_lr
        for group in groups:
            group["lr"] = self.lr if group["orthogonal"] else rate
            if not group["orthogonal"]:
                group["lr_scale"] = cast(float, group.get("lr_scale", 1.0)) * rate / self.lr
        adamw = muon.AdamWKeys(lr=rate, betas=(self.betas[0], self.betas[1]), eps=self.eps)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.newton_schulz]
        like_adamw = self.scale == "adamw"
        own = muon.MuonKeys(lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, dtype=dtype, like_adamw=like_adamw)
        return muon.WithAdamW(groups, adamw, own)


KINDS: tuple[type[Optimizer], ...] = (AdamW, Sgd, RmsProp, Lion, ScheduleFree, Muon)
REGISTRY: dict[str, type[Optimizer]] = {kind.model_fields["name"].default: kind for kind in KINDS}
REFUSED = {
    **dict.fromkeys(
        ("adafactor", "shampoo", "soap", "lamb", "lars"),
        "isn't supported: this optimizer needs complete tensors, but ZeRO gives workers slices",
    ),
    **dict.fromkeys(
        ("adamw_8bit", "adamw8bit", "adamw_bnb_8bit"),
        "isn't supported: ZeRO would split the blocks of the optimizer state, and resuming with another number of workers would "
        "change this state",
    ),
    "adagrad": "isn't supported: DeepSpeed replaces this optimizer with its own, which steps only one parameter group",
    "lbfgs": "isn't supported: this optimizer needs several losses per step",
}


def _refuse(value: object) -> object:
    """Raises ValueError with the reason if the value names a known optimizer that isn't supported."""
    name = value.get("name") if isinstance(value, dict) else None
    if isinstance(name, str) and (why := REFUSED.get(name.lower())):
        raise ValueError(f"name: {name!r} {why}. Use one of {', '.join(REGISTRY)}")
    return value


def _name(value: object) -> str:
    """Returns the optimizer's name in the value. If the value isn't a mapping, returns the default name. The default optimizer's
    validation then reports the error."""
    return str(value.get("name", DEFAULT) if isinstance(value, dict) else getattr(value, "name", DEFAULT))


if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    _KINDS = tuple(Annotated[kind, Tag(name)] for name, kind in REGISTRY.items())
    AnyOptimizer = Annotated[Union[_KINDS], Discriminator(_name), BeforeValidator(_refuse)]  # noqa: UP007 (made of a tuple)


def require_resumable(optimizer: Optimizer, recorded: dict[str, object]) -> None:
    """Checks that a run whose checkpoints were saved with the `recorded` keys can continue with this optimizer.

    Raises ConfigError if the checkpoints don't contain the optimizer's state. Other keys may change.
    """
    kind = REGISTRY.get(name := str(recorded.get("name", DEFAULT)))
    recorded_state = kind.model_validate(recorded).state if kind else None
    if recorded_state == optimizer.state:
        return
    keeps = ", ".join(optimizer.state) or "nothing"
    holds = (
        "state that this version of heliostat doesn't know" if recorded_state is None else ", ".join(recorded_state) or "nothing"
    )
    raise ConfigError(
        f"train.optimizer: {optimizer.name!r} keeps {keeps} per parameter, but the run's checkpoints ({name!r}) "
        f"contain {holds}. Set train.optimizer.name to {name!r}, or start another run"
    )
