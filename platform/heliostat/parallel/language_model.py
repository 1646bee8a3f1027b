"""Defines the attributes of a language model's recipe that the package `parallel` uses. Reads the numbers of experts from a
configuration.

Importing this module imports neither torch nor transformers, because most jobs are checked without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np

from heliostat.config.spec import Job

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def number(config: PreTrainedConfig) -> int | None:
    """Returns a configuration's number of routed experts per layer; None for a dense model."""
    return _first(config.get_text_config(decoder=True), EXPERTS)


def chosen(config: PreTrainedConfig) -> int | None:
    """Returns a configuration's number of routed experts per token; None for a dense model."""
    return _first(config.get_text_config(decoder=True), CHOSEN)


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    return next((n for name in names if (n := getattr(config, name, None))), None)


class SummedLoss(Protocol):
    """Contains the sum of a batch's loss terms."""

    @property
    def sum(self) -> torch.Tensor: ...


class LanguageModel(Protocol):
    """Lists the attributes of a language model's recipe that tests of an architecture need. Tests change these attributes in a
    copy of the recipe."""

    job: Job
    length: int
    document_mask: bool
    routes: bool
    router_weight: float | None
    tiled: bool
    tiled_mlp: bool
    checkpointing: int | Literal["selective"]
    offload: bool
    attention: str | None

    @property
    def config(self) -> PreTrainedConfig: ...
    def plainly(self) -> Self: ...
    def small(self, config: PreTrainedConfig, length: int, end: int) -> Self: ...
    def build(self) -> PreTrainedModel: ...
    def batch(self, content: np.ndarray) -> dict[str, torch.Tensor]: ...
    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> SummedLoss: ...
    def cut(self, batch: dict[str, torch.Tensor], part: int, parts: int) -> dict[str, torch.Tensor]: ...
