"""Simulates a run of N ranks in one process, and checks the run: `heliostat train JOB.yaml --dry-run --workers N`. The dry run
has these steps:

- It validates the job for N workers, and validates DeepSpeed's config with DeepSpeed's own classes.
- It builds the model on the meta device, and cuts its state as ZeRO does.
- It makes the checkpoint's index that the ranks would write.
- It makes the data plan, from the datasets if they can be read.

The dry run starts no worker, and allocates no memory for the model. The dry run raises ConfigError if a number of the job isn't
divisible as required, or if the model doesn't fit. It raises CheckpointError if the ranks' slices overlap or don't cover all
elements.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from heliostat.checkpoint import checksums, index, layout, placement
from heliostat.checkpoint.columns import ROWS, Columns
from heliostat.checkpoint.placement import BYTES, ChunkPlace, Shard, Tensor
from heliostat.checkpoint.safetensors_file import DTYPES
from heliostat.config.spec import Job
from heliostat.data import mixing
from heliostat.errors import DataError, StorageError
from heliostat.plan import auto, planner, zero_layout
from heliostat.plan.counts import ModelStats
from heliostat.plan.model_stats import build, stats_of
from heliostat.recipes.protocol import Recipe
from heliostat.validation import check

NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # of dtypes in checkpoints


def kinds(job: Job, hidden: bool = False) -> list[str]:
    """Lists the kinds of tensors that a checkpoint has per trained parameter: fp32 master weight, optimizer state, and the
    averages that the job keeps. `hidden`: whether the parameter is a hidden matrix, whose optimizer state differs."""
    return ["master", *job.train.optimizer.kept(hidden), *job.train.averages]


def dry_run(path: Path, settings: list[str], workers: int | None = None) -> dict[str, Any]:
    from heliostat.engine import deepspeed_engine

    started = time.perf_counter()
    job, recipe, unread = auto.prepared(path, settings + ([f"workers.count={workers}"] if workers else []))
    job = job.on(job.worker_counts()[-1])
    deepspeed_engine.require_config(job)
    data, note = _data(job, recipe, unread)
    built = build(recipe)
    model = stats_of(recipe, built)
    planner.plan(job, recipe, built=built)  # raises ConfigError if the job doesn't fit
    owned = _owned(job, model)
    saved, index_bytes = checkpoint_index(job, model, owned)
    sizes = [sum(4 * len(kinds(job, name in model.hidden)) * n for name, _, n in rank) for rank in owned]
    return {
        "name": job.name,
        "workers": job.workers.most,
        "stage": job.train.zero.stage,
        "parameters": model.parameters,
        "largest_share": max(sizes),
        "smallest_share": min(sizes),
        "shards": len(saved.shards),
        "tensors": len(saved.tensors),
        "chunks": sum(shards for t in saved.tensors.values() for _, shards, _, _ in t.runs),
        "checkpoint_bytes": sum(s.bytes for s in saved.shards) + index_bytes,
        "index_bytes": index_bytes,
        "data": data,
        "note": note,
        "seconds": time.perf_counter() - started,
    }


def _owned(job: Job, model: ModelStats) -> list[list[zero_layout.Slice]]:
    """Divides the trained parameters into the slices that each rank saves. Returns one list of slices per rank."""
    groups, stage, parallel = model.groups_of(job.train.optimizer), job.train.zero.stage, job.train.parallel
    if parallel.tensor > 1:
        shapes = {n: s for n, s in model.own(parallel.tensor).items() if n in model.trained}
        whole = frozenset(shapes) - frozenset(model.divided)
        return zero_layout.divided(shapes, stage, job.workers.most, groups, parallel.tensor, whole)
    workers, replicas = job.workers.most, job.workers.most // (job.train.zero.shard_group_size or job.workers.most)
    return zero_layout.slices(model.trained, stage, workers, groups, model.stacked, parallel.expert, replicas)


def _data(job: Job, recipe: Recipe, unread: str) -> tuple[dict[str, int], str]:
    """Computes the data plan's numbers from the datasets. Returns these numbers and a note. If the datasets can't be read, the
    note has the reason."""
    note = ""
    try:
        shape = check.check_data(job, recipe).plan.shape
    except (DataError, StorageError) as e:
        note = f"planned without the datasets ({unread or e})"
        size = 4 * job.data.sequence_length if job.data.sequence_length else 1
        shape = mixing.choose_shape(job.train.global_batch_size, job.virtual_ranks, size, job.data.shuffle_window)
    return {
        "lanes": shape.lanes,
        "lanes_per_rank": shape.lanes // job.replicas,
        "samples_per_rank": shape.batch // job.replicas,
        "micro_batch_size": job.train.micro_batch_size,
        "accumulation": job.accumulation,
        "steps_per_block": shape.steps_per_block,
        "window": shape.window,
    }, note


def checkpoint_index(job: Job, model: ModelStats, owned: list[list[zero_layout.Slice]]) -> tuple[placement.WrittenPart, int]:
    """Plans the checkpoint that the ranks would write. Returns the plan, and the bytes of `checkpoint.json` and the shards'
    indexes.

    Raises CheckpointError unless every element is in a shard exactly once.
    """
    whole, size = placement.WrittenPart([], {}), 0
    for rank, mine in enumerate(owned):
        tensors = _tensors(job, model, mine) | _buffers(model, rank, len(owned))
        if tensors:
            part, listing = _shard(rank, tensors)
            whole, size = placement.merge(whole, part), size + len(listing)
    facts = {"name": job.name, "world_size": len(owned), "zero_stage": job.train.zero.stage, "job": job.dump()}
    root = index.root(job.train.steps, {"format": layout.format_of(whole.tensors), **facts}, whole)
    return whole, size + len(layout.encode(root))


def _tensors(job: Job, model: ModelStats, mine: list[zero_layout.Slice]) -> placement.Tensors:
    parts = job.train.parallel.tensor
    by_columns = {n for n, kind in model.divided.items() if kind == "row"} if parts > 1 else set[str]()
    tensors = placement.Tensors()
    for name, start, numel in mine:
        for kind in kinds(job, name in model.hidden):
            columns = Columns(parts, model.shapes[name][1]) if name in by_columns else ROWS
            tensors[f"{kind}.{name}"] = Tensor("F32", [math.prod(model.shapes[name])], [[0, 1, start, numel]], columns)
    return tensors


def _buffers(model: ModelStats, rank: int, world: int) -> placement.Tensors:
    owners = placement.owners((f"buffer.{name}" for name in model.buffers), world)
    return {
        f"buffer.{name}": Tensor(NAMES[dtype], list(shape), [[0, 1, 0, math.prod(shape)]])
        for name, (shape, dtype) in model.buffers.items()
        if owners[f"buffer.{name}"] == rank
    }


def _shard(rank: int, tensors: placement.Tensors) -> tuple[placement.WrittenPart, bytes]:
    """Plans a rank's shard, with placeholder checksums of ten digits. Returns the shard's part of `checkpoint.json`, and the
    shard's index."""
    places, offset = dict[str, ChunkPlace](), 0
    for name, entry in tensors.items():
        ((_, _, start, numel),) = entry.runs
        size = numel * BYTES[entry.dtype]
        sums = [4294967295] * -(-size // checksums.BLOCK)
        places[name] = ChunkPlace(start, numel, offset, sums)
        offset += size
    listing = index.encode({"tensors": places})
    shard = Shard(f"shard-{rank:05d}.safetensors", offset, index.seal(listing))
    return placement.WrittenPart([shard], tensors), listing
