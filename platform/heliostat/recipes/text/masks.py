"""Keeps transformers from reading masks on a GPU. A read would make the host wait for all earlier work in every micro-batch.

transformers skips a mask that has no effect. To decide this, transformers reads two facts from a batch: whether samples contain
several documents, and whether the batch has padding. Recipes know the first fact, and pass this fact to `unread`. Instead of
reading the second fact, `unread` assumes padding. So a batch without padding also gets a mask, which has no effect. On a CPU,
transformers still reads both facts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import masking_utils

_whole: ContextVar[bool | None] = ContextVar("whole", default=None)  # None: outside `unread`


@contextmanager
def unread(whole: bool) -> Iterator[None]:
    """Opens a context in which a model's forward pass doesn't read masks. `whole`: whether every sample contains only one
    document."""
    _install()
    before = _whole.set(whole)
    try:
        yield
    finally:
        _whole.reset(before)


def _applies(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not torch.compiler.is_compiling() and tensor.device.type != "cpu" and _whole.get() is not None


@functools.cache
def _install() -> None:
    """Replaces the functions of transformers 5 that read masks."""
    utils: Any = masking_utils
    documents = utils.find_packed_sequence_indices

    def find_packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        if not _applies(position_ids):
            indices: torch.Tensor | None = documents(position_ids)
            return indices
        if _whole.get():
            return None
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    def padded(ignore: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(ignore)
        def decided(padding_mask: torch.Tensor | None, *args: Any, **named: Any) -> bool:
            return not _applies(padding_mask) and ignore(padding_mask, *args, **named)

        return decided

    utils.find_packed_sequence_indices = find_packed_sequence_indices
    for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
        setattr(utils, name, padded(getattr(utils, name)))
