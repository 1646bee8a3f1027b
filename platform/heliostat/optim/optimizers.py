"""Defines the optimizers that `train.optimizer.name` may name: one class each, which holds its keys in the job, the state that it
keeps of every parameter, and how torch builds it. Checkpoints, the plan and the checks follow from these;
docs/guides/optimizer.md adds one.

Importing this costs nothing: torch is imported where an optimizer is built. An optimizer belongs here if what it keeps of a
parameter is elementwise, because ZeRO cuts parameters, flat and end to end, anywhere into slices that the workers update apart,
and a checkpoint of one cut is loaded at another. What looks at whole tensors must bring them together in its step, as Muon does.
`REFUSED` names some that are not so.
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
DEFAULT = "adamw"  # what recorded jobs of before there were others do not name
STATE_BYTES = 4  # of an element of each state: fp32, as the masters are


class Optimizer(Strict):
    """Defines what every optimizer has."""

    name: str
    lr: Annotated[Float, Field(gt=0)]
    """Peak learning rate, which the schedule scales."""
    weight_decay: NonNegative

    copies: ClassVar[frozenset[str]] = frozenset()
    """Those of the state that begin as the parameter; the others begin as zeros."""
    averages: ClassVar[bool] = False
    """Keeps an average of the weights, as the state `ema`, which is evaluated and exported in their place."""
    orthogonalizes: ClassVar[bool] = False
    """Has a rule of its own for hidden matrices, which are parameter groups apart (`orthogonal`)."""

    @property
    @abstractmethod
    def state(self) -> tuple[str, ...]:
        """Returns the names, torch's own, of the optimizer state: fp32 tensors of a parameter's shape, kept for every parameter.
        Checkpoints hold them by these names."""

    def kept(self, hidden_matrix: bool) -> tuple[str, ...]:
        """Returns those names for a parameter, which is a hidden matrix or not."""
        return self.state

    @abstractmethod
    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        """Builds torch's optimizer for parameter groups, which hold `params` and `weight_decay`."""


class AdamW(Optimizer):
    """Optimizes by Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """Algorithm of the optimizer."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay rates of the first and the second moment."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""
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
    """Optimizes by stochastic gradient descent, with momentum (Sutskever et al. 2013) or, if that is 0, without any state."""

    name: Literal["sgd"] = "sgd"
    """Algorithm of the optimizer."""
    momentum: Rate = 0.9
    """Momentum: decay rate of the running sum of gradients; 0 keeps no optimizer state."""
    nesterov: bool = False
    """Nesterov momentum; needs a momentum above 0."""
    weight_decay: NonNegative = 0.0
    """L2 penalty of matrices: added to the gradient, times the weight."""

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
    """Optimizes by gradients over the root of a running mean of their squares (Tieleman & Hinton 2012, lecture 6.5)."""

    name: Literal["rmsprop"] = "rmsprop"
    """Algorithm of the optimizer."""
    alpha: Rate = 0.99
    """Decay rate of the mean of squared gradients."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to the square root."""
    weight_decay: NonNegative = 0.0
    """L2 penalty of matrices: added to the gradient, times the weight."""

    @property
    def state(self) -> tuple[str, ...]:
        return ("square_avg",)

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.RMSprop(groups, lr=self.lr, alpha=self.alpha, eps=self.eps)  # fused there is none


class Lion(Optimizer):
    """Optimizes by the sign of a momentum (Chen et al. 2023, arXiv 2302.06675). Wants about a fifth of AdamW's learning rate,
    and five times its weight decay."""

    name: Literal["lion"] = "lion"
    """Algorithm of the optimizer."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.99]
    """Share of the momentum in a step, and decay rate of the momentum."""
    weight_decay: NonNegative = 0.5
    """Decoupled weight decay of matrices."""

    @property
    def state(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def build(self, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        from heliostat.optim import update_rules

        return update_rules.LionStep(groups, self.lr, (self.betas[0], self.betas[1]))


class ScheduleFree(Optimizer):
    """Optimizes by AdamW with an average of the weights in a schedule's place (Defazio et al. 2024, arXiv 2405.15682). Needs
    `train.schedule.name: constant`; a warm-up is allowed. The average is evaluated, drawn from and exported."""

    name: Literal["schedule_free"] = "schedule_free"
    """Algorithm of the optimizer."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Interpolation between iterate and average for the gradients, and decay rate of the second moment."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""
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
    """Optimizes hidden matrices along their orthogonalized momentum (Jordan et al. 2024), and embeddings, output heads,
    convolutions, norms and biases by AdamW. Whole matrices are orthogonalized at every ZeRO stage."""

    name: Literal["muon"] = "muon"
    """Algorithm of the optimizer."""
    momentum: Rate = 0.95
    """Decay rate of the gradients' running mean, for hidden matrices."""
    nesterov: bool = True
    """Nesterov momentum."""
    scale: Literal["adamw", "spectral"] = "adamw"
    """Scale of the learning rate for a matrix. `adamw`: steps as large as AdamW's, so its learning rates fit. `spectral`: as
    Muon was published, the square root of rows over columns, at least 1, with learning rates of about 0.02."""
    newton_schulz: Literal["fp32", "bf16"] = "fp32"
    """Precision of the orthogonalization. `bf16` is faster on GPUs, but other worker counts then take slightly different
    steps."""
    adamw_lr: Annotated[Float, Field(gt=0)] | None = None
    """Peak learning rate of AdamW's parameters, which the schedule also scales. Unset: `lr`."""
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay rates of the first and the second moment."""
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    """AdamW's eps: added to the square root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of all matrices: hidden ones, embeddings, and heads."""
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
        ("adafactor", "shampoo", "soap", "lamb", "lars"), "isn't supported: it needs whole tensors, and ZeRO gives workers slices"
    ),
    **dict.fromkeys(
        ("adamw_8bit", "adamw8bit", "adamw_bnb_8bit"),
        "isn't supported: ZeRO would split the blocks of its state, and a resume on other workers would change it",
    ),
    "adagrad": "isn't supported: DeepSpeed replaces it, and then steps only one parameter group",
    "lbfgs": "isn't supported: it needs several losses per step",
}


def _refuse(value: object) -> object:
    """Refuses a known optimizer that is not supported, with the reason."""
    name = value.get("name") if isinstance(value, dict) else None
    if isinstance(name, str) and (why := REFUSED.get(name.lower())):
        raise ValueError(f"name: {name!r} {why}. Use one of {', '.join(REGISTRY)}")
    return value


def _name(value: object) -> str:
    """Returns the optimizer's name as given; the default's where the value is no mapping, which that model then reports."""
    return str(value.get("name", DEFAULT) if isinstance(value, dict) else getattr(value, "name", DEFAULT))


if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    _KINDS = tuple(Annotated[kind, Tag(name)] for name, kind in REGISTRY.items())
    AnyOptimizer = Annotated[Union[_KINDS], Discriminator(_name), BeforeValidator(_refuse)]  # noqa: UP007 (made of a tuple)


def require_resumable(optimizer: Optimizer, recorded: dict[str, object]) -> None:
    """Checks that a run whose checkpoints were made with the `recorded` keys can go on with this optimizer; ConfigError if not.
    The state that it keeps of every parameter must be what the checkpoints hold. Its other keys may change."""
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
        f"hold {holds}. Keep {name!r}, or start another run"
    )
