"""Changes the initial weights of a language model: the job's key `model.init`.

Every residual branch of a layer (attention or its replacement, and the MLP) ends in a matrix that writes to the residual stream.
With `zero_output_projections`, these matrices start as zeros. So each layer starts as the identity (Zhang et al. 2019, arXiv
1901.09321). All other weights keep the architecture's initialization.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from heliostat.errors import ConfigError
from heliostat.schema import Strict, validate

if TYPE_CHECKING:  # jobs are checked without torch
    import torch

KEY = "init"  # of the job's `model:`; not a key of an architecture
OUTPUTS = {"o_proj", "out_proj", "c_proj", "down_proj", "dense_4h_to_h", "fc2", "fc_out"}  # as transformers names them
DENSE = {"attention", "self_attention", "self_attn", "output"}  # modules in which `dense` is an output projection
BRANCHES = 2


class Init(Strict):
    zero_output_projections: bool = False
    """Initializes the last matrix of each residual branch with zeros, so that every layer starts as the identity."""


def read(model: Mapping[str, object]) -> Init:
    if KEY in model and "pretrained" in model:
        raise ConfigError(f"model.{KEY}: a pretrained model takes its first weights from its folder. Remove this key")
    return validate(Init, model.get(KEY, {}), f"model.{KEY}")


def output_projections(names: Iterable[str]) -> list[str]:
    """Selects the parameters that are output projections.

    If any branch of a layer lacks an output projection, selects no parameters.
    """
    branches, projections = defaultdict[str, set[str]](set), list[str]()
    for name in names:
        if inside := re.match(r"(.*?\.\d+)\.(.+)", name):
            layer, parts = inside[1], inside[2].split(".")
            branches[layer] |= {parts[0]} if _writes(parts) else set()
            if _writes(parts):
                projections.append(name)
    return projections if all(len(known) >= BRANCHES for known in branches.values()) else []


def _writes(parts: list[str]) -> bool:
    """Checks whether a parameter is the matrix at the end of a branch. `parts`: the parameter's name inside the layer, split at
    the dots."""
    *modules, last = parts
    if last != "weight":  # stacked matrices of experts are parameters with that name
        return last in OUTPUTS
    return bool(modules) and (modules[-1] in OUTPUTS or (modules[-1] == "dense" and bool(DENSE & set(modules[-2:-1]))))


def probe(init: Init, build: Callable[[], object]) -> None:
    """Raises ConfigError if the model that `build` makes lacks the matrices that `model.init` changes. Needs no memory for
    weights."""
    if init.zero_output_projections:
        import torch

        with torch.device("meta"):
            build()


def apply(init: Init, model: torch.nn.Module, arch: str) -> None:
    """Sets the weights of a new model. Raises ConfigError if the model lacks the matrices that `init` changes."""
    if not init.zero_output_projections:
        return
    import torch

    from heliostat.recipes.building import shape
    from heliostat.recipes.partitioning import assign

    parameters = dict(model.named_parameters())
    names = output_projections(parameters)
    if not names:
        raise ConfigError(
            f"model.{KEY}.zero_output_projections: heliostat doesn't know the output projections of {arch!r}. "
            "Set this key to false"
        )
    for name in names:
        if not parameters[name].is_meta:
            assign(parameters[name], torch.zeros(shape(parameters[name]), device="cpu"))
