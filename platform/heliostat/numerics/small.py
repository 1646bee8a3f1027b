"""Makes the small job that `heliostat check --numerics` runs. The small job has the job's own parallelism, precision, and
optimizer, but takes only seconds.

A model that is small enough stays unchanged. A larger transformers model is reduced in depth, width, and vocabulary. The model's
samples are shortened, and tokens are mapped into the smaller vocabulary. Other large models are rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from heliostat import schema
from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.config.train_section import Offload, Parallel, Zero
from heliostat.data.content import Content
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.numerics import shortening
from heliostat.parallel import tiny
from heliostat.recipes import adapters, loading, quantized
from heliostat.recipes.protocol import Batch, Recipe
from heliostat.recipes.text import attention
from heliostat.recipes.text.causal_lm import CausalLM

STEPS, SAVED = 4, 2  # steps of the trial, and the step after which it saves a checkpoint
WORKERS = 2
LARGEST = 20_000_000  # most parameters of a model that isn't reduced
LONGEST = 512  # most tokens per sample of a model that isn't reduced
TILE = 7  # tokens per tile of an MLP
BATCH = 16  # most samples per step, if the job has more
FOLDED = ("input_ids", "labels")  # tensors of a batch that contain tokens
ELSEWHERE: dict[int, Literal[1, 3]] = {0: 1, 1: 3, 2: 3, 3: 1}  # by ZeRO stage, the stage that loads the checkpoint


@dataclass(frozen=True)
class SmallTrial:
    """Contains the small job, its recipe, and a description of the model for the user."""

    job: Job
    recipe: Recipe
    description: str


def trial(job: Job, sources: list[Manifest], folder: Path, gpus: bool) -> SmallTrial:
    """Makes the small job and its recipe, for two workers of this machine. Raises ConfigError if the model is too large and can't
    be reduced."""
    size = _size(loading.load(job, sources, weights=False))
    if size <= LARGEST:
        small = small_job(job, folder, gpus, LONGEST)
        recipe = _loaded(small, sources)
        _shorten(recipe, LONGEST)
        return SmallTrial(small, recipe, f"the complete model, {size:,} parameters{left_out(job)}")
    small = small_job(job, folder, gpus, tiny.LENGTH)
    recipe = _loaded(small, sources)
    if not isinstance(recipe, CausalLM):
        raise ConfigError(
            f"recipe: --numerics runs models of up to {LARGEST:,} parameters, and this model has {size:,}. heliostat can "
            f"shrink only models of CausalLM. Make this model smaller with --set model.KEY=VALUE"
        )
    reduced = _cut(recipe, job)
    _shorten(recipe, tiny.LENGTH)
    if recipe.adapter:
        _keep_base(recipe, folder / "base")
    return SmallTrial(small, recipe, f"the model, reduced from {size:,} to {reduced:,} parameters{left_out(job)}")


def left_out(job: Job) -> str:
    """Describes the job's settings that the small job leaves out, because the check compares two workers with a plain process.

    Returns "" if the small job has all settings.
    """
    keys = {"train.ema": job.train.ema, "train.zero.shard_group_size": job.train.zero.shard_group_size,
            "train.zero.quantize_weights": job.train.zero.quantize_weights}  # fmt: skip
    named = ", ".join(key for key, value in keys.items() if value)
    return f", without {named}" if named else ""


def unaided(recipe: Recipe) -> Recipe:
    """Returns the recipe without optimizations for memory or speed. This recipe keeps all activations, computes complete logits
    and MLPs, and uses reference implementations instead of kernels."""
    if not isinstance(recipe, CausalLM):
        return recipe
    plain = recipe.plainly()
    plain.checkpointing = plain.offload = plain.tiled = plain.tiled_mlp = False
    return plain


def small_job(job: Job, folder: Path, gpus: bool, longest: int) -> Job:
    """Makes the small job, at the full learning rate. `folder`: the parent of the job's run folder. `longest`: the maximum number
    of tokens per sample."""
    micro, batch = job.train.micro_batch_size, job.train.global_batch_size
    if batch > BATCH or batch % (WORKERS * micro):
        sums = 2 if job.train.global_batch_size > job.workers.most * micro else 1
        micro = min(micro, BATCH // 4)
        batch = WORKERS * micro * sums
    raw = job.dump()
    raw["name"], raw["storage"], raw["spike"] = "numerics", str(folder), None
    raw["data"] |= {
        "virtual_ranks": batch // micro,
        "mix_schedule": [],
        "sequence_length": min(job.data.sequence_length or 0, longest) or None,
    }
    offload = {k: "cpu" for k, v in raw["train"]["zero"]["offload"].items() if v and k != "nvme_path"}
    zero: dict[str, object] = {"stage": job.train.zero.stage, "offload": offload}
    if job.train.zero.hpz_partition_size:
        zero["hpz_partition_size"] = WORKERS
    raw["train"] |= {"steps": STEPS, "stop_after": None, "global_batch_size": batch, "micro_batch_size": micro, "ema": None,
                     "zero": zero, "schedule": {"name": "constant"}}  # fmt: skip
    if not gpus:
        raw["train"] |= {"attention": attention.twin(job.train.attention), "fp8": False}
    if job.train.parallel.sequence > 1:
        raw["train"]["parallel"] = {"sequence": WORKERS}
    if job.train.parallel.expert > 1:
        raw["train"]["parallel"] = {"expert": WORKERS}
    if job.train.parallel.tensor > 1:
        raw["train"]["parallel"] = {"tensor": WORKERS}
    raw["checkpoint"] = {"every": SAVED}
    raw["workers"] = {"count": WORKERS, "gpus": min(1.0, job.workers.gpus) if gpus else 0.0}
    return spec.settle(schema.validate(Job, raw, "--numerics"), None)


def _loaded(job: Job, sources: list[Manifest]) -> Recipe:
    """Loads the recipe of the small job. The tiles of tiled MLPs are so small that each sample has several tiles."""
    recipe = loading.load(job, sources)
    if isinstance(recipe, CausalLM):
        recipe.tile = TILE
    return recipe


def elsewhere(job: Job) -> Job:
    """Returns the job with another parallelism configuration: another ZeRO stage, and only one worker, which computes complete
    samples."""
    stage = ELSEWHERE[job.train.zero.stage]
    if stage == 3 and adapters.in_4_bits(job.model):
        stage = 1
    optimizer = job.train.zero.offload.optimizer if stage == 3 else None
    zero, parallel = Zero(stage=stage, offload=Offload(optimizer=optimizer)), Parallel()
    train = job.train.model_copy(update={"zero": zero, "parallel": parallel})
    return job.on(1).model_copy(update={"train": train})


def _cut(recipe: CausalLM, job: Job) -> int:
    """Sets the recipe's configuration to the largest model of its architecture that is small enough. Returns the model's number
    of parameters. Raises ConfigError if no such model can be built."""
    whole, recipe.pretrained = recipe.config, None
    heads = 2 * WORKERS if job.train.parallel.tensor > 1 else 2  # so that each worker has query heads and key/value heads
    for config in tiny.shrunk(whole, job.data.sequence_length or recipe.length, heads):
        recipe.config = config
        try:
            size = _size(recipe)
        except Exception:  # noqa: BLE001  an architecture's own code may raise anything; the next size may work
            continue
        if size <= LARGEST:
            _fold(recipe, tiny.VOCABULARY)
            return size
    raise ConfigError(
        f"model: can't make a small model of {whole.model_type!r} for --numerics. Set a smaller size with --set model.KEY=VALUE"
    )


def _size(recipe: Recipe) -> int:
    with torch.device("meta"):
        return quantized.count(recipe.build())


def _keep_base(recipe: CausalLM, folder: Path) -> None:
    """Writes a reduced base with random weights, on which the recipe trains its adapter. A checkpoint names this base."""
    plain = unaided(recipe)
    assert isinstance(plain, CausalLM)
    plain.adapter = None
    plain.build().save_pretrained(folder)
    recipe.pretrained = str(folder)


def _shorten(recipe: Recipe, longest: int) -> None:
    """Shortens the rows of a language model. The samples of tokens are short already, because the small job cuts them."""
    if not isinstance(recipe, CausalLM) or recipe.kind != "rows":
        return
    unshortened: Callable[..., Batch] = recipe.batch
    recipe.length = min(recipe.length, longest)

    def batch(content: Content, keys: np.ndarray | None = None) -> Batch:
        return unshortened(shortening.shortened(content, recipe.length), keys)

    recipe.batch = batch  # type: ignore[method-assign]


def _fold(recipe: CausalLM, vocabulary: int) -> None:
    """Maps the tokens of batches into a smaller vocabulary: token id modulo vocabulary size."""
    unfolded: Callable[..., Batch] = recipe.batch

    def batch(content: Content, keys: np.ndarray | None = None) -> Batch:
        tensors = unfolded(content, keys)
        return tensors | {name: torch.where(tensors[name] < 0, tensors[name], tensors[name] % vocabulary) for name in FOLDED}

    recipe.batch = batch  # type: ignore[method-assign]
