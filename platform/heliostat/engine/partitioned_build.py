"""Builds models at ZeRO stage 3: each worker keeps its part of a parameter as soon as the parameter is made."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from heliostat.recipes import partitioning


class ZeroInit:
    """Partitions through `deepspeed.zero.Init`, for recipes (`heliostat.recipes.partitioning.Partitioner`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def constructing(self) -> AbstractContextManager[Any]:
        from deepspeed.runtime.zero import Init

        made: AbstractContextManager[Any] = Init(config_dict_or_path=self.config)
        return made

    def whole(self, parameter: torch.Tensor) -> AbstractContextManager[Any]:
        from deepspeed.runtime.zero import GatheredParameters

        gathered: AbstractContextManager[Any] = GatheredParameters([parameter], modifier_rank=0)
        return gathered


@contextmanager
def building(config: dict[str, Any]) -> Iterator[None]:
    """Makes models that recipes build inside partitioned, as this DeepSpeed config describes."""
    importlib.import_module("torch._dynamo")  # its first import fails under zero.Init
    from transformers.integrations import HfDeepSpeedConfig

    stage = HfDeepSpeedConfig(config)  # while it lives, transformers builds and initialises models partitioned
    with partitioning.by(ZeroInit(stage.config)):
        yield
