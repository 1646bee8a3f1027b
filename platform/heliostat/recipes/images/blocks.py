"""Finds the blocks of a backbone, reads the output of one block, and routes tokens around blocks.

All of this uses forward hooks, so diffusers' classes stay unchanged, and gradient checkpointing works: a block that is computed
again in the backward pass calls its hooks again, with the same values. Blocks are counted from 1, in the order in which they
compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from heliostat.errors import ConfigError


@dataclass(frozen=True)
class BlockList:
    """Describes the blocks of a class. `lists`: the attributes with blocks, in the order of computation.

    - `image`: the index of the image's values in a block's output, if the output is a tuple.
    - `routes`: whether a block can process only some tokens of an image. Blocks with convolutions can't.
    - `positions`: the index of the tokens' rotary positions [n, 1, tokens, ...] in a block's arguments.
    """

    lists: tuple[str, ...]
    image: int = 0
    routes: bool = False
    positions: int | None = None


BLOCKS = {
    "UNet2DConditionModel": BlockList(("down_blocks", "mid_block", "up_blocks")),
    "PixArtTransformer2DModel": BlockList(("transformer_blocks",), routes=True),
    "SD3Transformer2DModel": BlockList(("transformer_blocks",), image=1, routes=True),
    "FluxTransformer2DModel": BlockList(("transformer_blocks", "single_transformer_blocks"), image=1),
    "SanaTransformer2DModel": BlockList(("transformer_blocks",)),
    "PRXTransformer2DModel": BlockList(("blocks",), routes=True, positions=3),
}
POSITIONS = "image_rotary_emb"  # name of the argument with rotary positions


def blocks(key: str, backbone: Any) -> list[Any]:
    """Lists a backbone's blocks. Raises ConfigError, with the job's `key` at its beginning, for a class without known blocks."""
    listed: list[Any] = []
    for name in _kind(key, backbone).lists:
        part = getattr(backbone, name)
        listed += part if isinstance(part, nn.ModuleList) else [part]
    return listed


def block(key: str, backbone: Any, number: int) -> Any:
    """Returns a block by its number, counted from 1. Raises ConfigError if there is no such block."""
    listed = blocks(key, backbone)
    if number > len(listed):
        raise ConfigError(f"{key}: {number} given, but the backbone has {len(listed)} blocks. Use at most {len(listed)}")
    return listed[number - 1]


def require_routing(key: str, backbone: Any) -> None:
    """Raises ConfigError unless the backbone's blocks can process only some tokens of an image."""
    if not _kind(key, backbone).routes:
        able = ", ".join(name for name, kind in BLOCKS.items() if kind.routes)
        raise ConfigError(f"{key}: not supported with {type(backbone).__name__}. Remove this key, or use one of: {able}")


def width(backbone: Any, of: Any) -> int:
    """Returns the number of channels of a block's output."""
    if hasattr(of, "resnets"):
        return int(of.resnets[-1].out_channels)
    config = backbone.config
    return int(getattr(config, "hidden_size", 0) or config.num_attention_heads * config.attention_head_dim)


def _kind(key: str, backbone: Any) -> BlockList:
    name = type(backbone).__name__
    if name not in BLOCKS:
        raise ConfigError(f"{key}: not supported with {name}. Remove this key, or use one of: {', '.join(BLOCKS)}")
    return BLOCKS[name]


class BlockOutput:
    """Reads the output of one block in each forward pass, between `begin` and `take`."""

    def __init__(self, backbone: Any, of: nn.Module) -> None:
        self._image, self._reads = _kind("", backbone).image, False
        self._value: torch.Tensor | None = None
        of.register_forward_hook(self._read)

    def begin(self) -> None:
        self._reads = True

    def take(self, size: torch.Size) -> torch.Tensor:
        """Returns the output as a map, [n, height, width, channels]. `size`: height and width of the backbone's input."""
        assert self._value is not None
        value, self._value, self._reads = self._value, None, False
        if value.dim() == 4:
            return value.permute(0, 2, 3, 1)
        side = math.isqrt(size[0] * size[1] // value.shape[1])  # of a token
        return value.unflatten(1, (size[0] // side, size[1] // side))

    def _read(self, module: nn.Module, args: object, output: Any) -> None:
        if self._reads:
            self._value = output[self._image] if isinstance(output, tuple) else output


class TokenRouter:
    """Lets some tokens skip the blocks `first` to `last`. `choose(hidden)` returns the indices of the tokens that don't skip,
    int64 [n, kept], or None if all tokens go through the blocks."""

    def __init__(
        self, backbone: Any, first: nn.Module, between: list[nn.Module], last: nn.Module,
        choose: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:  # fmt: skip
        kind = _kind("", backbone)
        self._image, self._positions, self._choose = kind.image, kind.positions, choose
        self._kept: torch.Tensor | None = None
        self._all: torch.Tensor | None = None
        first.register_forward_pre_hook(self._select, with_kwargs=True)
        for module in between if self._positions is not None else ():
            module.register_forward_pre_hook(self._place, with_kwargs=True)
        last.register_forward_hook(self._restore)

    def _select(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._kept, self._all = self._choose(hidden), hidden
        if self._kept is None:
            return None
        chosen = hidden.gather(1, self._kept[..., None].expand(-1, -1, hidden.shape[-1]))
        return ((chosen, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": chosen})

    def _place(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Selects the positions of the chosen tokens."""
        assert self._positions is not None
        if self._kept is None:
            return None
        positions = args[self._positions] if args else kwargs[POSITIONS]
        index = self._kept.view(len(positions), 1, -1, *[1] * (positions.dim() - 3)).expand(
            -1, positions.shape[1], -1, *positions.shape[3:]
        )
        chosen = positions.gather(2, index)
        if args:
            return (*args[: self._positions], chosen, *args[self._positions + 1 :]), kwargs
        return args, {**kwargs, POSITIONS: chosen}

    def _restore(self, module: nn.Module, args: object, output: Any) -> Any:
        """Puts the tokens that skipped the blocks back into their places."""
        if self._kept is None:
            return None
        assert self._all is not None
        hidden = output[self._image] if isinstance(output, tuple) else output
        whole = self._all.scatter(1, self._kept[..., None].expand_as(hidden), hidden.to(self._all.dtype))
        if isinstance(output, tuple):
            return (*output[: self._image], whole, *output[self._image + 1 :])
        return whole
