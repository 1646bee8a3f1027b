"""Works out in one process what N ranks would do, and checks it: `heliostat train JOB.yaml --dry-run --workers N`.

Validates the job for N workers, validates DeepSpeed's config with DeepSpeed's own classes, builds the model on the meta device,
cuts its state as ZeRO does, makes the checkpoint index that those ranks would write, and makes the data plan (with the datasets,
if they can be read). Nothing starts, and no memory is taken for the model. Raises ConfigError for whatever does not divide, does
not fit, or has no name of its own.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import heliostat.check as check
from heliostat.checkpoint import checksums, layout
from heliostat.config.spec import Job
from heliostat.data import mixing
from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.plan import planner, zero_layout
from heliostat.plan.model_stats import ModelStats, build, stats_of


def kinds(job: Job) -> list[str]:
    """Lists what a checkpoint holds of every trained parameter: fp32 master, optimizer state, EMA if there is one."""
    return ["master", *job.train.optimizer.state, *([layout.EMA] if job.train.ema else [])]


def dry_run(path: Path, settings: list[str], workers: int | None = None) -> dict[str, Any]:
    started = time.perf_counter()
    job, recipe, _ = planner.prepare(path, settings + ([f"workers.count={workers}"] if workers else []))
    job = job.on(job.worker_counts()[-1])
    check_engine(job)
    data, note = _data(job, recipe)
    built = build(recipe)
    model = stats_of(recipe, built)
    planner.plan(job, recipe, built=built)  # refuses a job that cannot fit
    owned = zero_layout.slices(model.trained, job.train.zero.stage, job.workers.most, model.groups)
    index = checkpoint_index(job, model, owned)
    sizes = [4 * len(kinds(job)) * sum(n for _, _, n in rank) for rank in owned]
    return {
        "name": job.name,
        "workers": job.workers.most,
        "stage": job.train.zero.stage,
        "parameters": model.parameters,
        "largest_share": max(sizes),
        "smallest_share": min(sizes),
        "shards": len(index["shards"]),
        "tensors": len(index["tensors"]),
        "chunks": sum(len(t["chunks"]) for t in index["tensors"].values()),
        "checkpoint_bytes": sum(s["bytes"] for s in index["shards"]) + (size := len(layout.encode(index))),
        "index_bytes": size,
        "data": data,
        "note": note,
        "seconds": time.perf_counter() - started,
    }


def check_engine(job: Job) -> None:
    """Raises ConfigError if DeepSpeed itself would refuse the ZeRO section of the job's config."""
    from heliostat.train.worker import deepspeed_engine

    deepspeed_engine.prepare_environment(job.workers.gpus)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**deepspeed_engine.engine_config(job)["zero_optimization"])
    except ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(
            f"train.deepspeed: zero_optimization.{'.'.join(map(str, first['loc']))}: {first['input']!r}: {first['msg']}"
        ) from e


def _data(job: Job, recipe: Any) -> tuple[dict[str, Any], str]:
    """Computes the numbers of the data plan, from the datasets if they can be read; else a note gives the reason."""
    note = ""
    try:
        shape = check.check_data(job, recipe).plan.shape
    except (DataError, StorageError) as e:
        note = f"the datasets were not read ({e})"
        size = 4 * job.data.sequence_length if job.data.sequence_length else 1
        shape = mixing.choose_shape(job.train.global_batch, job.lanes, size, job.data.window)
    workers = job.workers.most
    return {
        "lanes": shape.lanes,
        "lanes_per_rank": shape.lanes // workers,
        "samples_per_rank": shape.batch // workers,
        "micro_batch": job.train.micro_batch,
        "accumulation": job.accumulation,
        "steps_per_block": shape.steps_per_block,
        "window": shape.window,
    }, note


def checkpoint_index(job: Job, model: ModelStats, owned: list[list[zero_layout.Slice]]) -> dict[str, Any]:
    """Builds the `checkpoint.json` that the ranks would write, with checksums of ten digits.

    Checks that every element is in a shard exactly once.
    """
    tensors: dict[str, Any] = {
        f"{kind}.{name}": {"dtype": "F32", "shape": [math.prod(shape)], "chunks": []}
        for kind in kinds(job)
        for name, shape in model.trained.items()
    }
    shards: list[dict[str, Any]] = []
    for rank, mine in enumerate(owned):
        if not mine:
            continue
        offset = 0
        for name, start, numel in mine:
            for kind in kinds(job):
                sums = [4294967295] * -(-4 * numel // checksums.BLOCK)
                chunk = {"shard": len(shards), "start": start, "numel": numel, "crc32": sums, "offset": offset}
                tensors[f"{kind}.{name}"]["chunks"].append(chunk)
                offset += 4 * numel
        shards.append({"file": f"shard-{rank:05d}.safetensors", "bytes": offset})
    for name, (shape, dtype) in model.buffers.items():
        tensors[f"buffer.{name}"] = {"dtype": dtype, "shape": list(shape), "chunks": []}
    _check_whole(tensors)
    facts = {"name": job.name, "world_size": len(owned), "zero_stage": job.train.zero.stage, "job": job.dump()}
    return {"format": layout.FORMAT, "step": job.train.steps, **facts, "shards": shards, "tensors": tensors}


def _check_whole(tensors: dict[str, Any]) -> None:
    """Raises AssertionError unless the chunks of every sliced tensor cover it completely, each element once."""
    for name, entry in tensors.items():
        at = 0
        for chunk in sorted(entry["chunks"], key=lambda c: c["start"]):
            assert chunk["start"] == at, f"{name}: {at} to {chunk['start']} is in no shard, or in two"
            at += chunk["numel"]
        assert not entry["chunks"] or at == entry["shape"][0], f"{name}: ends at {at} of {entry['shape'][0]}"
