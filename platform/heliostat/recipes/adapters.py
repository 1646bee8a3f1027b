"""Adds a trained adapter to a frozen pretrained model, with the layers of `peft`: the job's key `model.adapter`.

    model:
      pretrained: models/llama-3-8b
      adapter: {method: lora, rank: 16, targets: all-linear}

For a linear layer with weight W [out, in], an adapter trains A [rank, in] and B [out, rank]:

- `lora` computes W x + alpha / rank B A x (Hu et al. 2021, arXiv 2106.09685);
- `rslora` computes W x + alpha / sqrt(rank) B A x (Kalajdzievski 2023, arXiv 2312.03732);
- `dora` also trains the norm of each row of W + alpha / rank B A (Liu et al. 2024, arXiv 2402.09353).

The base (all other parameters) is in no gradient, optimizer state, average, or checkpoint. With `base: nf4`, the base's linear
layers are in 4 bits (`recipes.quantized`). A checkpoint records the base's digest. The first A depends only on `train.seed` and
the layer's name, so it is the same at every ZeRO stage. The first B is zero.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from heliostat import extras
from heliostat.errors import CheckpointError, ConfigError
from heliostat.recipes.folder_digests import weights_digest, weights_state
from heliostat.recipes.precision import dtype_of
from heliostat.recipes.protocol import Recipe, Weight
from heliostat.schema import Float, Strict, nearest, validate
from heliostat.text import brief

if TYPE_CHECKING:  # jobs are checked without torch
    import torch

KEY = "adapter"
ALL = "all-linear"
NAME = "default"  # peft's name of an adapter
STREAM = 1 << 20  # of random numbers, apart from the streams of samples
BASE, DOWN, UP, MAGNITUDE = "base_layer", f"lora_A.{NAME}.weight", f"lora_B.{NAME}.weight", f"lora_magnitude_vector.{NAME}.weight"
SHORT = {DOWN: "lora_A.weight", UP: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}  # as files name the matrices


class Adapter(Strict):
    """Describes the adapter to train on a pretrained model. Only the adapter is trained."""

    method: Literal["lora", "rslora", "dora"] = "lora"
    """`lora`; `rslora`: scales by alpha / sqrt(rank), so that large ranks don't train more slowly; `dora`: also trains the norm
    of each row of the weights."""
    rank: int = Field(default=16, gt=0)
    """Rank of the trained matrices."""
    alpha: Float | None = Field(default=None, gt=0)
    """Scale of the adapter before the division by the rank. Unset: the rank, so that the scale of `lora` is 1."""
    dropout: Float = 0.0
    """Only 0 is supported, because a dropped value would depend on the number of workers."""
    targets: str | list[str] = ALL
    """Linear layers that get an adapter: `all-linear` (all except the output head), or the ends of layer names, such as
    `[q_proj, v_proj]`."""
    base: Literal["nf4"] | None = None
    """`nf4`: stores the base's linear layers, except the output head, in 4 bits (QLoRA). Unset: in the precision of training."""

    @model_validator(mode="after")
    def _suits_its_base(self) -> Adapter:
        if self.base and self.method == "dora":
            raise ValueError("dora needs complete weights, so it isn't supported with base: nf4. Set method to lora or rslora")
        return self

    @field_validator("dropout")
    @classmethod
    def _is_zero(cls, value: float) -> float:
        if value:
            raise ValueError(
                f"dropout in adapters isn't supported, because samples must not depend on workers ({value}). Set it to 0"
            )
        return value

    @field_validator("targets")
    @classmethod
    def _names_layers(cls, value: str | list[str]) -> str | list[str]:
        if value != ALL and (isinstance(value, str) or not value or len(set(value)) < len(value)):
            raise ValueError(f"expected a list of different names, got {value}. Write {ALL}, or names such as [q_proj, v_proj]")
        return value

    @property
    def scale(self) -> float:
        """Returns the factor of B A."""
        return self.strength / (math.sqrt(self.rank) if self.method == "rslora" else self.rank)

    @property
    def strength(self) -> int | float:
        """Returns alpha, which is the rank if the job doesn't set it."""
        return self.rank if self.alpha is None else int(self.alpha) if self.alpha.is_integer() else self.alpha

    @property
    def settings(self) -> dict[str, object]:
        """Returns the settings that determine the model, by key. Equal models have equal settings."""
        targets = self.targets if isinstance(self.targets, str) else sorted(self.targets)
        return {"method": self.method, "rank": self.rank, "alpha": self.strength, "targets": targets, "base": self.base}


def read(model: Mapping[str, Any], pretrained: object, key: str = "model.pretrained") -> Adapter | None:
    """Reads `model.adapter`. `key`: of the base. Raises ConfigError without a pretrained model, or without peft."""
    if KEY not in model:
        return None
    if model[KEY] is None:
        raise ConfigError(f"model.{KEY}: expected a mapping, got null. Write for example {{rank: 16}}, or remove this key")
    if not pretrained:
        raise ConfigError(f"model.{KEY}: needs a pretrained model as its base. Set {key}, or remove this key")
    extras.require("adapters", "peft", what=f"model.{KEY}")
    return validate(Adapter, model[KEY], f"model.{KEY}")


def in_4_bits(model: Mapping[str, Any]) -> bool:
    """Checks whether the section `model` of a job asks for a base in 4 bits."""
    section = model.get(KEY)  # of any type in other recipes
    return bool(isinstance(section, Mapping) and section.get("base") == "nf4")


def require_resumable(model: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the section `model` of a job has the adapter of the run's checkpoint. `recorded`: the section
    `model` of the job in the checkpoint."""
    now, before = (section.get(KEY) for section in (model, recorded))
    fix = "or use another name for the run"
    if (now is None) != (before is None):
        has = "trained no adapter. Remove this key" if before is None else f"trained one. Set it to {before}"
        raise ConfigError(f"model.{KEY}: the run's checkpoint {has}, {fix}")
    if now is None:
        return
    wanted, saved = (Adapter.model_validate(section).settings for section in (now, before))
    for key, value in wanted.items():
        if value != saved[key]:
            before, now = ("none" if each is None else each for each in (saved[key], value))
            undo = "Remove it" if saved[key] is None else f"Set it to {before}"
            raise ConfigError(f"model.{KEY}.{key}: the run's checkpoint has {before}, got {now}. {undo}, {fix}")


class Adapts(ABC):
    """Trains an adapter on a pretrained base if the job asks for one. `adapter`: None if all weights are trained."""

    adapter: Adapter | None
    job: Any

    @abstractmethod
    def base(self) -> Path:
        """Returns the folder of the base's weights."""

    @abstractmethod
    def adapter_files(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        """Returns the tensors of an exported adapter by file, as `Exports.tensors` does for a model. `shapes`: the shapes of the
        model's parameters."""

    @abstractmethod
    def save_adapter_config(self, folder: Path, layers: list[str]) -> dict[str, str]:
        """Writes the configuration of an exported adapter. Returns the metadata of the file of weights. `layers`: the names of
        the layers with an adapter."""

    @abstractmethod
    def reload(self, folder: Path, adapter: bool) -> torch.nn.Module:
        """Loads an export in fp32 with only peft, transformers, and diffusers: the merged model, or the base with an adapter."""

    def plainly(self) -> Any:
        """Returns a recipe that computes the same without GPU kernels."""
        return self

    @abstractmethod
    def answer(self, model: torch.nn.Module) -> torch.Tensor:
        """Computes the outputs of a model for a fixed small batch, to compare an export with the trained model."""


@dataclass(frozen=True)
class AdapterBase:
    """Describes the frozen base of a run: its folder. `trained`: names of the trained parameters, and whether each can
    be all zero. `state`: the sizes and times of the folder's files when the model was built."""

    folder: Path
    trained: Mapping[str, bool]
    state: tuple[tuple[str, int, int], ...]

    @cached_property
    def digest(self) -> str:
        """Computes the digest of the weights and configuration that the model was built from, once. Raises CheckpointError if
        the folder's files have changed since."""
        computed = weights_digest(self.folder)
        if weights_state(self.folder) != self.state:
            raise CheckpointError(
                f"{self.folder}: the base has changed since the run loaded it, so a checkpoint can't name it. Restore the folder"
            )
        return computed


def base_of(recipe: Recipe, model: torch.nn.Module) -> AdapterBase | None:
    """Returns the base of a model that trains an adapter; None if the model trains all its weights."""
    if not isinstance(recipe, Adapts) or recipe.adapter is None:
        return None
    trained = {name: name.endswith(UP) for name, p in model.named_parameters() if p.requires_grad}
    return AdapterBase(recipe.base(), trained, weights_state(recipe.base()))


def is_base(parameter: torch.Tensor) -> bool:
    """Checks whether a parameter belongs to the frozen base of an adapter, so that checkpoints leave it out."""
    return getattr(parameter, "of_base", False)


# choosing layers ------------------------------------------------------------------------------------------------------


def every_linear(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yields a model's linear layers, except the output head, with their names."""
    import torch

    head = getattr(model, "get_output_embeddings", lambda: None)()
    return ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head)


def adaptable(layer: torch.nn.Linear) -> bool:
    """Checks whether an adapter can be added to the output of a layer. This is false for a subclass whose output isn't a tensor
    [..., out], such as a router of experts, and inside torch's `MultiheadAttention`, which doesn't call the layer."""
    import torch

    from heliostat.recipes import partitioning

    if type(layer) is torch.nn.Linear:
        return True
    if isinstance(layer, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    shapes = {name: partitioning.shape(p) for name, p in layer.named_parameters()}
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        out = torch.func.functional_call(layer, empty, torch.empty(2, layer.in_features, device="meta"))
    except Exception:  # noqa: BLE001  a subclass can raise anything
        return False
    return isinstance(out, torch.Tensor) and out.shape == (2, layer.out_features)


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Lists the names of the linear layers to which an adapter can be added. The output head isn't one of these."""
    return [name for name, layer in every_linear(model) if adaptable(layer)]


def chosen(adapter: Adapter, model: torch.nn.Module) -> list[str]:
    """Lists the layers that get an adapter. Raises ConfigError if a name in `targets` names no linear layer, or a layer to which
    no adapter can be added."""
    layers = linear_layers(model)
    if not layers:
        raise ConfigError(f"model.{KEY}: the model has no linear layers ({type(model).__name__}). Use another pretrained model")
    if adapter.targets == ALL:
        return layers
    for name, layer in every_linear(model):
        if name not in layers and any(_ends(name, end) for end in adapter.targets):
            kind = type(layer).__name__
            raise ConfigError(f"model.{KEY}.targets: no adapter can be added to {name}, a {kind}. Use names without this layer")
    for name in adapter.targets:
        if not any(_ends(layer, name) for layer in layers):
            near = nearest(name, sorted({layer.rpartition(".")[2] for layer in layers}))
            raise ConfigError(f"model.{KEY}.targets: {name!r} is the name of no linear layer{near}")
    return [layer for layer in layers if any(_ends(layer, name) for name in adapter.targets)]


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def shortest(layers: list[str], every: list[str]) -> list[str]:
    """Returns the last parts of the layers' names if these parts name exactly these layers among `every`, else the full names.

    `every`: the names of all modules of the model, because peft compares a name with all of them.
    """
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    return ends if {n for n in every if any(_ends(n, end) for end in ends)} == set(layers) else layers


# building -------------------------------------------------------------------------------------------------------------


def peft_config(adapter: Adapter, layers: list[str], **options: Any) -> Any:
    """Makes the configuration that peft needs for an adapter of these layers."""
    from peft import LoraConfig

    alpha: Any = adapter.strength  # peft declares an integer, and computes with any number
    return LoraConfig(
        r=adapter.rank, lora_alpha=alpha, use_rslora=adapter.method == "rslora", use_dora=adapter.method == "dora",
        target_modules=layers, **options,
    )  # fmt: skip


def add(adapter: Adapter, model: torch.nn.Module, seed: int, precision: str) -> None:
    """Freezes a model, and adds an adapter to its linear layers, with the first weights of `seed`.

    `precision`: of the training, in which the base is stored. Raises ConfigError if a name in `targets` names no layer, or if
    peft doesn't support these layers.
    """
    from heliostat.recipes import quantized, weightless

    layers = chosen(adapter, model)
    if adapter.base:
        quantized.replace(model, [name for name, _ in every_linear(model)])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.of_base = True  # type: ignore[attr-defined]
    added = _inject(adapter, model, layers)
    for name, layer in added.items():
        down, up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        weightless.starts_as(down, partial(first_down, seed, name, tuple(down.shape)))
        weightless.starts_as(up, partial(_zeros, tuple(up.shape)))
        if adapter.method == "dora":
            magnitude = layer.lora_magnitude_vector[NAME].weight
            weightless.starts_as(magnitude, partial(_norms, precision), layer.get_base_layer().weight)
    for parameter in model.parameters():
        parameter.requires_grad_(not is_base(parameter))


def _inject(adapter: Adapter, model: torch.nn.Module, layers: list[str]) -> dict[str, Any]:
    """Adds peft's layers to a model. Returns them by name. Raises ConfigError if peft doesn't support one of the layers.

    For example, peft turns `down_proj` of some mixtures of experts into the stacked experts, and supports no `out_proj` of Mamba.
    """
    from peft import inject_adapter_in_model

    fault, kind = "", type(model).__name__
    try:
        inject_adapter_in_model(peft_config(adapter, layers), model, adapter_name=NAME)
    except ValueError as e:
        fault = brief(e)
    added = dict(adapted(model))
    if missing := [name for name in layers if name not in added]:
        fault = fault or f"it adds no adapter to {missing[0]}"
    if fault:
        raise ConfigError(f"model.{KEY}.targets: peft doesn't support these layers of {kind} ({fault}). Name other layers")
    return added


def round_base(adapter: Adapter | None, model: torch.nn.Module) -> None:
    """Rounds the weights of a base without adapters to the numbers that the run trained on."""
    from heliostat.recipes import quantized

    if adapter and adapter.base:
        quantized.round_all(model, [name for name, _ in every_linear(model)])


def adapted(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields peft's layers of a model, with their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))


@contextmanager
def switched_off(model: torch.nn.Module) -> Iterator[None]:
    """Opens a context in which a model computes as its base. In contrast to peft's `enable_adapters`, doesn't change which
    parameters need gradients, because the engine has read this."""
    layers = [layer for _, layer in adapted(model)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def first_down(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draws the first A of a layer: uniform between -1 / sqrt(in) and 1 / sqrt(in), as peft does; fp32 [rank, in]."""
    import torch

    from heliostat.recipes.counter_random import uniform, words

    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    drawn = uniform(words(seed, torch.tensor([key], device="cpu"), STREAM, math.prod(shape)))
    return drawn.view(shape).mul_(2).sub_(1).div_(math.sqrt(shape[1]))


def _zeros(shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.zeros(shape, device="cpu")


def _norms(precision: str, weight: torch.Tensor) -> torch.Tensor:
    """Computes the norm of each row of a weight in the precision of training, fp32 [out]."""
    return weight.to(dtype_of(precision)).float().norm(dim=1)
