"""Shards the matrices of each layer over the workers of a group (`train.parallel.tensor`), with DeepSpeed's AutoTP.

Ranks [0, n) are the first group, [n, 2n) the second, and so on. Some weights are cut by rows (column-parallel: by outputs) or by
columns (row-parallel: by inputs). Each worker has an equal part of these weights, and every other weight completely. ZeRO shards
a worker's weights over the workers with the same part, one per group.

heliostat passes the name of every module to AutoTP, and turns off AutoTP's own search by name patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from heliostat.engine import patches
from heliostat.errors import TrainingError
from heliostat.parallel import division
from heliostat.parallel.division import Division, of
from heliostat.recipes.protocol import DividesMatrices, Recipe

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

KINDS: dict[str, dict[str, str | bool]] = {"column": {"partition_type": "column"}, "row": {"partition_type": "row"},
         "summed": {"partition_type": "skip", "grad_allreduce": True}}  # fmt: skip


def settings(recipe: Recipe, model: torch.nn.Module, workers: int) -> dict[str, object]:
    """Builds the section of DeepSpeed's config that shards the model's matrices. The section is empty for one worker."""
    if workers == 1:
        return {}
    assert isinstance(recipe, DividesMatrices)
    specs = [{"patterns": patterns, **KINDS[kind]} for kind, patterns in _patterns(recipe.divided_matrices(model)).items()]
    chosen = {"use_default_specs": False, "layer_specs": specs}
    return {"tensor_parallel": {"autotp_size": workers, "vocab_parallel_lm_head": False, "partition_config": chosen}}


def _patterns(modules: Mapping[str, str]) -> dict[str, list[str]]:
    """Builds regular expressions for the modules' weights, by kind of parallelism. One expression covers all layers. For modules
    whose gradients are summed, the expression also matches the biases. AutoTP handles other biases itself."""
    by_layout: dict[str, set[str]] = {}
    for name, kind in modules.items():
        layers = re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name))
        by_layout.setdefault(kind, set()).add(rf"^{layers}\.{'(weight|bias)' if kind == 'summed' else 'weight'}$")
    return {kind: sorted(patterns) for kind, patterns in by_layout.items()}


@contextmanager
def dividing(recipe: Recipe, model: torch.nn.Module, workers: int) -> Iterator[None]:
    """Shards the matrices of a model in the same way as DeepSpeed when DeepSpeed makes an engine. The model's parameters have
    shapes, but no values yet. Records on each parameter which part this worker has.

    Set the parameters' values inside the context, because the end of the context adds hooks on gradients. Collective.
    """
    if workers == 1:
        yield
        return
    group, complete = patches.divide_matrices(model, settings(recipe, model, workers), workers)
    _mark(model, group, workers)
    yield
    complete()


def _mark(model: torch.nn.Module, group: dist.ProcessGroup, parts: int) -> None:
    """Records on each parameter its complete shape, and this worker's part. Raises TrainingError if the parts are unequal, or if
    DeepSpeed already has groups of a different size."""
    if dist.get_world_size(group) != parts:  # DeepSpeed keeps its groups for later engines
        raise TrainingError(
            f"train.parallel.tensor: this process already has DeepSpeed groups of {dist.get_world_size(group)} workers, "
            f"not of {parts}. Start the run in a new process"
        )
    rank = dist.get_rank(group)
    for parameter in model.parameters():
        if not (cut := patches.matrix_part(parameter)):
            continue
        if len(set(cut.sizes)) > 1:
            raise TrainingError(
                f"train.parallel.tensor: DeepSpeed sharded a matrix of {cut.shape} into unequal parts: {list(cut.sizes)}. "
                "Use another number of workers"
            )
        division.note(parameter, cut.shape, Division(rank, parts, group, cut.shape[1] if cut.by == 1 else 0))


def check(recipe: Recipe, engine: DeepSpeedEngine) -> None:
    """Raises TrainingError unless AutoTP has sharded exactly the matrices that the recipe lists."""
    if engine.autotp_size() <= 1:
        return
    patches.stop_input_check(engine)
    assert isinstance(recipe, DividesMatrices)
    model = engine.module
    wanted = {(name, kind) for name, kind in recipe.divided_matrices(model).items() if kind != "summed"}
    cut = {name.removesuffix(".weight"): of(p) for name, p in model.named_parameters() if p.dim() > 1}
    divided = {(name, "row" if how.width else "column") for name, how in cut.items() if how.parts > 1}
    if wanted != divided:
        some = ", ".join(f"{name} ({kind})" for name, kind in sorted(wanted ^ divided)[:3])
        raise TrainingError(
            f"train.parallel.tensor: DeepSpeed didn't shard exactly the matrices that the recipe lists. Different: {some}. "
            "Correct the recipe's divided_matrices"
        )


def clipped_norm(engine: DeepSpeedEngine, limit: float) -> torch.Tensor:
    """Clips the gradients of an engine at stage 0 by their global norm. Returns the norm, a scalar on the device. Collective."""
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    squares = [
        torch.nn.utils.get_total_norm([p.grad for p in trained if (of(p).parts > 1) == divided]).double().square()
        for divided in (True, False)
    ]
    dist.all_reduce(squares[0], group=engine.mpu.get_tensor_model_parallel_group())
    norm = torch.stack(squares).sum().sqrt().float()
    torch.nn.utils.clip_grads_with_norm_(trained, limit or float("inf"), norm)
    return norm
