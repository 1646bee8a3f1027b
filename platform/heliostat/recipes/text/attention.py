"""Chooses the attention implementation of a language model: `train.attention`.

Each GPU kernel has a CPU reference implementation with the same results. The plan, and trials on a small model, use the
reference. A job that trains on CPUs can't use a GPU kernel.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from heliostat.errors import ConfigError, MissingExtraError
from heliostat.parallel.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KEY = "train.attention"
TWINS = dict.fromkeys(("flash_attention_2", "flash_attention_3", "flex_attention"), "sdpa")
PACKAGES = {"flash_attention_2": ("flash_attn", "flash-attn"), "flash_attention_3": ("flash_attn_interface", "flash-attn-3")}
SUPPORT = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"} | dict.fromkeys(PACKAGES, "_supports_flash_attn")


def twin(name: str | None) -> str | None:
    """Returns the CPU reference implementation of a kernel."""
    return TWINS.get(name, name) if name else None


def chosen(config: PreTrainedConfig, name: str | None, shapes_only: bool) -> PreTrainedConfig:
    """Returns the model's configuration with the attention that the job chose.

    `shapes_only`: uses the kernel's CPU reference instead, because the model has only shapes, and no weights.
    """
    if name is None:
        return config
    name = (twin(name) if shapes_only else name) or name
    require_installed(name)
    config = copy.deepcopy(config)
    config._attn_implementation = name
    return config


def require(recipe: LanguageModel) -> None:
    """Raises ConfigError unless the architecture's code in transformers supports this attention."""
    name, kind = recipe.attention, recipe.config.model_type
    usual = recipe.plainly()
    usual.attention = None
    with torch.device("meta"):
        model = usual.build()
    choices = ["eager", *(other for other, flag in SUPPORT.items() if getattr(model, flag, False))]
    supported = [other for other in choices if twin(other) in choices]
    if name not in supported:
        raise ConfigError(f"{KEY}: {kind!r} doesn't support {name!r}. Use {' or '.join(supported)}")


def require_installed(name: str) -> None:
    """Raises MissingExtraError if a kernel's package is missing. Otherwise, transformers would download a kernel from its hub."""
    module, package = PACKAGES.get(name, ("", ""))
    if module and find_spec(module) is None:
        raise MissingExtraError(
            f"{KEY}: {name!r} needs the package {package}, built for your versions of torch and CUDA. Install "
            f"{package} on every worker, or set this key to sdpa"
        )
