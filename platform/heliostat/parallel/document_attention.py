"""Computes attention over long samples of several documents without a mask of all pairs of tokens.

A mask of all pairs grows with the square of the sample's length: 16 GiB at 131,072 tokens. Here, queries attend in blocks of
`ROWS`. Each block has its own mask, against the keys up to the block's last query. The backward pass recomputes each block, so
only one mask is in memory at a time. Pairs whose key comes after the last query of the block are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

ROWS = 1024  # queries per block: at 131,072 tokens, a mask has 128 MiB

Attended = tuple[torch.Tensor, object]  # the output, and the attention weights if an implementation returns them
Core = Callable[..., Attended]
Drawn = tuple[torch.Tensor, tuple[list[int], list[torch.Tensor]]]  # states of the generators: the host's, the devices'


def numbers(positions: torch.Tensor) -> torch.Tensor:
    """Computes each token's document number in its sample, int32 [batch, tokens], from positions of the same shape. A position of
    0 begins a document."""
    return (positions == 0).cumsum(1, dtype=torch.int32)


def mask(documents: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Builds the mask of queries `first` to `end` - 1 against the keys before `end`: bool [batch, 1, queries, keys], True where a
    query attends to a key."""
    same = documents[:, first:end, None] == documents[:, None, :end]
    return same.tril_(first)[:, None]


def mask_bytes(length: int, itemsize: int) -> int:
    """Counts the bytes of a sample's largest mask.

    Each pair of tokens takes one byte in the mask. Each pair also takes `itemsize` bytes in the bias that fused kernels compute
    from the mask.
    """
    return min(ROWS, length) * length * (1 + itemsize)


def in_blocks(core: Core) -> Core:
    """Wraps the attention `core`. The returned function takes document numbers instead of a mask, and computes in blocks. Without
    document numbers, the returned function does the same as `core`."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: torch.Tensor | None,
        **options: object,
    ) -> Attended:
        if documents is None:
            return core(module, query, key, value, None, **options)
        if query.shape[2] <= ROWS:
            return core(module, query, key, value, mask(documents, 0, query.shape[2]), **options)

        def block(some: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
            end = keys.shape[2]
            return core(module, some, keys, values, mask(documents, first, end), **options)[0]

        attended: torch.Tensor = Blocks.apply(block, bool(options.get("dropout")), query, key, value)
        return attended, None

    return attend


class Blocks(torch.autograd.Function):
    """Computes attention block by block. Queries, keys, and values: [batch, heads, tokens, width]. Result: [batch, tokens, heads,
    width]. Only these three inputs are saved for the backward pass."""

    @staticmethod
    def forward(ctx: Any, block: Callable[..., torch.Tensor], draws: bool, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.block, ctx.random = block, _random(tensors[0]) if draws else None
        ctx.save_for_backward(*tensors)
        query, key, value = tensors
        return torch.cat([block(query[:, :, a:b], key[:, :, :b], value[:, :, :b], a) for a, b in _spans(query)], dim=1)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        of_query = torch.empty_like(query)
        # a key gets gradients from many blocks, which are summed in fp32
        of_key, of_value = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (key, value))
        with _drawn_again(ctx.random, query):
            for a, b in _spans(query):
                leaves = [x.detach().requires_grad_() for x in (query[:, :, a:b], key[:, :, :b], value[:, :, :b])]
                with torch.enable_grad():
                    output = ctx.block(*leaves, a)
                some, keys, values = torch.autograd.grad(output, leaves, upstream[0][:, a:b])
                of_query[:, :, a:b] = some
                of_key[:, :, :b] += keys
                of_value[:, :, :b] += values
        return None, None, of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _spans(query: torch.Tensor) -> list[tuple[int, int]]:
    length = query.shape[2]
    return [(first, min(first + ROWS, length)) for first in range(0, length, ROWS)]


def _random(tensor: torch.Tensor) -> Drawn:
    return torch.get_rng_state(), get_device_states(tensor)


@contextmanager
def _drawn_again(random: Drawn | None, tensor: torch.Tensor) -> Iterator[None]:
    """Opens a context in which the random numbers (dropout) are the same as in the forward pass, if the forward pass drew any."""
    if random is None:
        yield
        return
    on_host, (devices, states) = random
    with torch.random.fork_rng(devices=devices, device_type=tensor.device.type if devices else "cuda"):
        torch.set_rng_state(on_host)
        set_device_states(devices, states, device_type=tensor.device.type)
        yield
