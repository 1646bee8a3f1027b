"""Computes the attention of samples whose tokens are divided into ranges, one per worker (Ulysses; Jacobs et al. 2023, arXiv
2309.14509).

Before attention, a worker has all heads of some tokens. The workers of a group then exchange values, so that each worker has some
heads of all tokens. After attention, the workers reverse the exchange. DeepSpeed's `UlyssesSPAttentionHF` exchanges the values
before and after the model's own attention. This package can't import the engine, so the engine passes this class to `exchanging`.
No other part of a model may mix tokens; `cutting` tests this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from heliostat.parallel import document_attention
from heliostat.parallel.document_attention import Attended, Core

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "cut"


class HeadExchange(Protocol):
    """Wraps an attention function. The wrapper's inputs are some tokens of all heads. The wrapper calls `attention` with all
    tokens of some heads. `sizes`: the result of this module's `sizes`."""

    def __call__(
        self, attention: Core, group: dist.ProcessGroup, micro_batch_size: int, sizes: tuple[int, int, int], layers: int
    ) -> Core: ...


_exchange: ContextVar[HeadExchange | None] = ContextVar("head_exchange", default=None)


@contextmanager
def exchanging(exchange: HeadExchange) -> Iterator[None]:
    """Opens a context in which `use` exchanges heads with the function `exchange`."""
    token = _exchange.set(exchange)
    try:
        yield
    finally:
        _exchange.reset(token)


def use(model: PreTrainedModel, group: dist.ProcessGroup, micro_batch_size: int, documents: bool) -> None:
    """Makes a transformers model exchange heads within the group from now on. `documents`: each position 0 begins a document, and
    documents don't attend to each other.

    Raises RuntimeError outside `exchanging`, in which the engine calls a recipe's `exchange`.
    """
    exchange = _exchange.get()
    if exchange is None:
        raise RuntimeError(
            "sequence_attention.use: no engine exchanges heads here. Call this function in a recipe's exchange(model, group)"
        )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    attention = exchange(core(model), group, micro_batch_size, sizes(model.config), layers)

    def gathered(positions: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(positions) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, positions, group=group)
        return torch.cat(parts, dim=1)

    name = f"{NAME}-{dist.get_world_size(group)}-{micro_batch_size}{'-documents' if documents else ''}"  # by settings
    install(model, name, Attention(attention, gathered if documents else None))


class Attention:
    """Computes the attention of a model's layers. `exchanged` computes one layer. `gathered` assembles the positions of complete
    samples; None if documents may attend to each other."""

    def __init__(self, exchanged: Core, gathered: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        self.exchanged, self.gathered = exchanged, gathered
        self._positions: torch.Tensor | None = None  # positions of `_documents`; all layers of a forward pass get the same tensor
        self._documents: torch.Tensor | None = None

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: object,
        position_ids: torch.Tensor,
        **options: object,
    ) -> Attended:
        """Computes a layer's attention. Ignores the model's mask, which covers only this worker's tokens."""
        options.pop("attention_mask", None)
        if self.gathered and position_ids is not self._positions:
            self._positions, self._documents = position_ids, document_attention.numbers(self.gathered(position_ids))
        return self.exchanged(module, query, key, value, self._documents, position_ids=position_ids, **options)


def install(model: PreTrainedModel, name: str, attention: Core) -> None:
    """Registers an attention function, which makes its own masks, with transformers under `name`. Makes the model use this
    attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _no_mask)
    model.config._attn_implementation = name


def core(model: PreTrainedModel) -> Core:
    """Returns the function that computes the model's attention. This function takes document numbers instead of a mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return document_attention.in_blocks(ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation])


def sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Returns a model's number of attention heads, its number of key/value heads, and the width of a head."""
    text = config.get_text_config(decoder=True)
    heads, width = text.num_attention_heads, getattr(text, "head_dim", None)
    return heads, getattr(text, "num_key_value_heads", None) or heads, width or text.hidden_size // heads


def exchanged(config: PreTrainedConfig, length: int, parts: int) -> int:
    """Counts the elements that each worker sends in the forward pass of a sample: queries, keys, values, and attention outputs.
    Every worker gets each key/value head at least once."""
    heads, shared, width = sizes(config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return int(layers * length // parts * (2 * heads + 2 * max(shared, parts)) * width * (parts - 1) // parts)


def _no_mask(*_: object, **__: object) -> None:
    return None
