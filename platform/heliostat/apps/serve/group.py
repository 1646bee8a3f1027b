"""Runs a causal language model on a changing set of rows: continuous batching with the model's own KV cache.

Rows share a batch, padded on the left. If the cache has plain keys and values, later rows join the group, and rows that have
ended leave the group. If the cache uses sliding windows, the group keeps all rows until the last row has ended. With any other
kind of cache, such as recurrent states, the model computes all tokens again at each step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from heliostat.apps.serve.adapters import Adapters


class RowBatch:
    """Holds a group of rows: the attention mask [rows, width], and the cache. `logits`: float [rows, vocabulary], the logits of
    each row's next token. `names`: each row's adapter."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[list[int]],
        pad: int,
        names: Sequence[str | None] = (),
        adapters: Adapters | None = None,
    ) -> None:
        self.names, self.adapters = list(names), adapters
        self.model, self.takes = model, inspect.signature(model.forward).parameters
        self.named = "cache" if "cache" in self.takes else "past_key_values"  # the parameter's name before transformers 5.24
        self.reuses = True
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        self.mask, self.ids = mask, ids
        self.cache: Any = None  # a DynamicCache, whose layers have keys and values
        self.logits = self._forward(ids, (mask.cumsum(-1) - 1).clamp(min=0))
        if self.cache is not None:
            self.ids = ids[:, :0]

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def plain(self) -> bool:
        """Returns whether rows can join and leave the batch. This requires that every layer's cache has only keys and values, for
        all positions."""
        return type(self.cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    @property
    def width(self) -> int:
        """Returns the number of cache positions per row, including padding."""
        return self.mask.shape[1]

    @property
    def place_bytes(self) -> float:
        """Returns the bytes that one cache position of one row takes, over all layers; 0 without a cache."""
        layers = self.cache.layers if self.cache is not None else []
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / self.mask.numel()

    def step(self, tokens: Sequence[int]) -> None:
        """Appends one token to each row, and computes the logits of the row's next token."""
        new = torch.tensor(tokens, device=self.model.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(new)], 1)
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)
        if self.cache is None:
            self.ids = torch.cat([self.ids, new], 1)
            self.logits = self._forward(self.ids, places)
        else:
            self.logits = self._forward(new, places[:, -1:])

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the given rows of the batch. Removes the cache's leading columns that contain only padding in all of these
        rows."""
        chosen = torch.tensor(rows, device=self.mask.device)
        self.mask, self.logits = self.mask[chosen], self.logits[chosen]
        self.names = [self.names[row] for row in rows] if self.names else []
        first = int(self.mask.any(0).int().argmax())
        self.mask = self.mask[:, first:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[chosen, :, first:], layer.values[chosen, :, first:]

    def join(self, other: RowBatch) -> None:
        """Appends the rows of another group to this group. If that fails, both groups stay unchanged."""
        rows, before, width = len(self), self.width, max(self.width, other.width)
        mask = torch.cat([_left(self.mask, width, 1), _left(other.mask, width, 1)])
        logits = torch.cat([self.logits, other.logits])
        try:
            for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
                mine.keys = torch.cat([_left(mine.keys, width, 2), _left(theirs.keys, width, 2)])
                mine.values = torch.cat([_left(mine.values, width, 2), _left(theirs.values, width, 2)])
        except BaseException:
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:rows, :, -before:], layer.values[:rows, :, -before:]
            raise
        self.mask, self.logits = mask, logits
        self.names += other.names

    def _forward(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        options = {"position_ids": places, "logits_to_keep": 1, self.named: self.cache, "use_cache": self.reuses}
        options = {name: value for name, value in options.items() if name in self.takes}
        with self.adapters.using(self.names) if self.adapters else nullcontext():
            out = self.model(input_ids=ids, attention_mask=self.mask, **options)
        cache = getattr(out, self.named, None) if self.reuses else None
        self.reuses = isinstance(cache, DynamicCache) and all(isinstance(layer, DynamicLayer) for layer in cache.layers)
        self.cache = cache if self.reuses else None
        return out.logits[:, -1].float()


def _left(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Pads a tensor's dimension with zeros on the left, up to `width`."""
    shape = list(tensor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim) if shape[dim] else tensor
