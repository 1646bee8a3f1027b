"""Computes experts that are sharded over the workers of a group (expert parallelism). Each token goes to the workers that have
the token's experts, and the results come back.

Each worker of the group has the same number of complete experts of every layer, in rank order. No token is dropped: a worker
accepts any number of tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from heliostat.parallel import experts
from heliostat.parallel.experts import ExpertLayer


def use(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Makes a transformers model compute with all experts of its group. The model's modules contain only this worker's
    experts."""
    workers = dist.get_world_size(group)
    for module in experts.layers(model):
        module.all_experts = module.num_experts
        module.num_experts = module.num_experts // workers
        module.forward = partial(_forward, module, group, workers)


class Exchange(torch.autograd.Function):
    """Sends rows to the workers of a group, a given number to each worker. The backward pass sends gradients in the opposite
    direction."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.way = got, sent, group
        return _exchanged(rows, sent, got, group)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchanged(upstream[0], *ctx.way), None, None, None


def _exchanged(rows: torch.Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    arrived = rows.new_empty((sum(got), rows.shape[1]))
    dist.all_to_all_single(arrived, rows.contiguous(), got, sent, group=group)
    return arrived


def _forward(
    module: ExpertLayer,
    group: dist.ProcessGroup,
    workers: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Computes a layer's experts for the tokens of all workers of its group.

    `top_k_index` contains numbers of the experts of all these workers. A number larger than the last expert's number means that
    the token has no expert.
    """
    each, count = top_k_index.shape[-1], module.num_experts  # `count`: this worker's experts
    flat = top_k_index.reshape(-1)
    tokens = torch.zeros(module.all_experts + 1, dtype=torch.int64, device=flat.device)
    tokens.scatter_add_(0, flat.clamp(max=module.all_experts), torch.ones_like(flat))
    leaving = tokens[:-1].contiguous()
    coming = torch.empty_like(leaving)
    dist.all_to_all_single(coming, leaving, group=group)
    sent, got = leaving.view(workers, count).sum(1).tolist(), coming.view(workers, count).sum(1).tolist()
    order = torch.sort(flat, stable=True).indices[: sum(sent)]
    arrived = Exchange.apply(hidden_states[order // each], sent, got, group)
    numbers = torch.arange(count, device=flat.device).repeat(workers).repeat_interleave(coming)
    computed = Exchange.apply(_computed(module, arrived, numbers), got, sent, group)
    back = computed.new_zeros((len(flat), computed.shape[1])).index_copy(0, order, computed).view(-1, each, computed.shape[1])
    return (back * top_k_weights.reshape(-1, each, 1)).sum(1).to(hidden_states.dtype)


def _computed(module: ExpertLayer, rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Computes each row with its expert.

    Adds one row of zeros, so that the weights have a gradient even if no row arrived. Without this gradient, the other workers
    would wait.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    numbers = torch.cat([numbers, numbers.new_zeros(1)])[:, None]
    return grouped_mm_experts_forward(module, rows, numbers, rows.new_ones(len(rows), 1))[:-1]
