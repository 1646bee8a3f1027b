"""Makes kernels give the same bits each time, for a while: `train.recheck` compares bits.

torch's deterministic algorithms are asked for with warnings alone, because an operation that has none would raise. Fused
attention ignores a request with warnings alone: its backward pass adds up in any order. So the request is made strict around each
attention kernel, all of which have a deterministic form. flash-attn's own kernels read an environment variable.

Compiled models run no such modes. What is compiled keeps torch's request with warnings alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heliostat.recipes.text.selective import ATTENTION

FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # which transformers reads at each call of flash-attn


@contextmanager
def kernels(compiled: bool) -> Iterator[None]:
    """Computes deterministically inside, forwards and backwards, as far as there are kernels. `compiled`: some of the model is
    compiled, or its attention is."""
    uninitialized: Any = torch.utils.deterministic  # a module of properties
    cudnn = torch.backends.cudnn
    before = (
        uninitialized.fill_uninitialized_memory,
        cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
        os.environ.get(FLASH),
    )
    with _algorithms(warn_only=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis.*")
        uninitialized.fill_uninitialized_memory = False  # it costs time, and nothing is read there
        cudnn.benchmark = False  # workers could choose other convolutions
        torch.backends.cuda.enable_cudnn_sdp(False)  # it has no deterministic form
        os.environ[FLASH] = "1"
        try:
            with nullcontext() if compiled else _StrictAttention():
                yield
        finally:
            uninitialized.fill_uninitialized_memory, cudnn.benchmark = before[:2]
            torch.backends.cuda.enable_cudnn_sdp(before[2])
            os.environ.pop(FLASH)
            if before[3] is not None:
                os.environ[FLASH] = before[3]


@contextmanager
def _algorithms(warn_only: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _StrictAttention(TorchDispatchMode):
    """Runs attention kernels, and their backward passes, under the strict request."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.name.partition("::")[2].startswith(ATTENTION):
            return func(*args, **(kwargs or {}))
        with _algorithms(warn_only=False):
            return func(*args, **(kwargs or {}))
