"""Compares the CPU seconds of a training step of heliostat's engine with those of plain loops of diffusers and accelerate.

    heliostat data prepare pipelines/quickstart-images.yaml --set resolution=32 --set output=FOLDER
    OMP_NUM_THREADS=1 python -m tests.benchmarks.diffusion_steps FOLDER [--stages 1 2 3] [--precisions fp32 bf16] [--steps 8]
        [--batch 32]

All train the U-Net of `diffusion.py`, in one process of one thread each, and take turns after each step. So other programs, which
change the speed of a shared machine, slow all of them. `deepspeed` is accelerate with its DeepSpeed plugin at the same stage and
precision, and sums the gradients of micro-batches in fp32, as heliostat does; `plain` is accelerate alone, with autocast in bf16.
Each step decodes its images and tokenizes its captions, as the examples of diffusers do. The files are in memory. A run of
heliostat reads each shuffle window once, in other processes: the first line says what this costs per step. Ray, MLflow, and the
second worker are left out (see `diffusion.py`). `ours` has the environment variables of a training worker, which make glibc keep
freed memory. The others have the variables of the command.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from heliostat.cluster import connect
from heliostat.cluster.processes import free_port
from heliostat.data.dataset import Dataset, open_dataset
from heliostat.engine import deepspeed_engine, ema, patches
from heliostat.recipes.images import rows
from heliostat.recipes.images.pipeline import tokenize
from heliostat.validation import check

from tests.benchmarks import diffusion, harness
from tests.gpu import setting

WARM = 3  # steps that aren't counted


class Case(NamedTuple):
    """Describes a job. `batch`: images per step, in two micro-batches."""

    data: Path
    stage: int
    precision: str
    batch: int

    @property
    def mixed(self) -> str:
        return "no" if self.precision == "fp32" else self.precision

    def checked(self) -> Any:
        settings = {
            "data.path": self.data, "data.virtual_ranks": 1, "workers.count": 1, "mlflow.register": "null", "model.samples": {},
            "train.zero.stage": self.stage, "train.precision": self.precision, "train.global_batch_size": self.batch,
            "train.micro_batch_size": self.batch // 2, **{f"model.backbone.{k}": v for k, v in diffusion.CHANNELS.items()},
        }  # fmt: skip
        keys = [f"{key}={value}" for key, value in settings.items()]
        return check.check(check.load_job(harness.ROOT / "jobs/quickstart-diffusion.yaml", keys))


def ours(case: Case) -> Iterator[None]:
    """Trains with heliostat's engine; yields after each step."""
    setting.start()
    made = case.checked()
    job, recipe, dataset = made.job, made.recipe, open_dataset(made.plan)
    engine = deepspeed_engine.build_engine(job, recipe)
    average, size = ema.of(job, engine), job.train.micro_batch_size
    content, end = pa.table({}), 0
    for step in range(job.train.steps):
        samples = dataset.order.step(step).ravel()
        if samples[-1] >= end:
            content, begin, end = window(dataset, samples[0])
        now = content.take(samples - begin)
        deepspeed_engine.set_lr(engine, job.train.lr(step))
        for first in range(0, len(samples), size):
            keys = step * len(samples) + np.arange(first, first + size)
            loss = recipe.loss(engine, recipe.batch(now.slice(first, size), keys))
            engine.backward(loss.sum / size)
            engine.step()
        deepspeed_engine.gradient_norm(engine, job.train.grad_clip)
        assert average
        average.update(step + 1)
        yield


def window(dataset: Dataset, position: int) -> tuple[pa.Table, int, int]:
    """Reads the shuffle window that contains a position, and returns its samples and their positions [begin, end)."""
    _, begin, end = dataset.order.window_at(position)
    content = dataset.read(dataset.order.locate(np.arange(begin, end)))
    assert isinstance(content, pa.Table)
    return content, begin, end


def reading(case: Case) -> str:
    dataset = open_dataset(case.checked().plan)
    _, begin, end = window(dataset, 0)
    least = min(harness.cpu(lambda: window(dataset, 0)) for _ in range(3))
    steps = (end - begin) / case.batch
    return f"heliostat reads a window of {end - begin} images in {least:.3f} CPU s: {least / steps:.4f} CPU s per step"


def with_deepspeed(case: Case) -> Iterator[None]:
    """Trains with the loop of diffusers' examples, and accelerate's DeepSpeed; yields after each step."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0",
                   "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    patches.skip_shared_memory_kernel()  # which takes minutes to compile, and which one process doesn't use
    made = case.checked()
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from diffusers import training_utils

    training_utils.deepspeed = deepspeed  # diffusers imports it only if a plugin with ZeRO-3 exists before
    train = made.job.train

    def accelerator() -> Any:
        plugin = DeepSpeedPlugin(gradient_accumulation_steps=2, gradient_clipping=train.grad_clip, zero_stage=case.stage)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = train.micro_batch_size
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
        return Accelerator(mixed_precision=case.mixed, gradient_accumulation_steps=2, deepspeed_plugin=plugin)

    yield from loop(made, accelerator)


def plain(case: Case) -> Iterator[None]:
    """Trains with the loop of diffusers' examples, and accelerate alone; yields after each step."""
    from accelerate import Accelerator

    yield from loop(case.checked(), lambda: Accelerator(cpu=True, mixed_precision=case.mixed, gradient_accumulation_steps=2))


def loop(made: Any, make: Callable[[], Any]) -> Iterator[None]:
    """Builds the model before the accelerator: under a plugin with ZeRO-3, transformers would shard only the text encoder."""
    from diffusers.training_utils import EMAModel

    job, recipe = made.job, made.recipe
    dataset: Dataset = open_dataset(made.plan)
    torch.manual_seed(job.train.seed)
    model, scheduler = recipe.build(), recipe.process.scheduler("ddpm")
    average = EMAModel(model.parameters(), decay=job.train.ema.decay, foreach=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.optimizer.lr, fused=True)
    content = dataset.read(dataset.order.locate(dataset.order.step(0).ravel()))
    assert isinstance(content, pa.Table)
    empty, size = recipe.parts.empty["text"], job.train.micro_batch_size
    accelerator = make()
    model, optimizer = accelerator.prepare(model, optimizer)
    dtype = next(model.parameters()).dtype
    while True:
        for first in range(0, len(content), size):
            with accelerator.accumulate(model):
                part = content.slice(first, size)
                image, ids = rows.pixels(part), tokenize(recipe.parts.tokenizers[0], part["caption"].to_pylist()).input_ids
                noise = torch.randn_like(image)
                t = torch.randint(0, scheduler.config.num_train_timesteps, (len(image),))
                ids = torch.where(torch.rand(len(image), 1) < recipe.model.caption_dropout, empty, ids)
                predicted = model(scheduler.add_noise(image, noise, t).to(dtype), t, ids)
                loss = F.mse_loss(predicted.float(), scheduler.get_velocity(image, noise, t))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), job.train.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
        average.step(model.parameters())
        yield


LOOPS: dict[str, Callable[[Case], Iterator[None]]] = {"ours": ours, "deepspeed": with_deepspeed, "plain": plain}


def serve(name: str, case: Case, pipe: Connection) -> None:
    """Takes a step for each message, and answers with its CPU seconds, until the message is False."""
    torch.set_num_threads(1)
    steps = LOOPS[name](case)
    while pipe.recv():
        pipe.send(harness.cpu(lambda: next(steps)))


def seconds(case: Case, steps: int) -> dict[str, list[float]]:
    """Takes a step of each loop after another, each loop in a process of its own. Returns the CPU seconds of each step."""
    context, pipes, spent = multiprocessing.get_context("spawn"), dict[str, Connection](), {name: list[float]() for name in LOOPS}
    before = dict(os.environ)
    for name in LOOPS:
        pipes[name], end = context.Pipe()
        os.environ |= connect.worker_environment(gpus=0) if name == "ours" else {}  # a new process inherits it
        context.Process(target=serve, args=(name, case, end), daemon=True).start()
        os.environ.clear()
        os.environ.update(before)
        end.close()
    for _ in range(WARM + steps):
        for name, pipe in pipes.items():
            pipe.send(True)
            spent[name].append(pipe.recv())  # EOFError if the loop failed: its error is above
    for pipe in pipes.values():
        pipe.send(False)
    return {name: one[WARM:] for name, one in spent.items()}


def main() -> None:
    options = harness.arguments(__doc__, data=Path, stages=[1, 2, 3], precisions=["fp32", "bf16"], steps=8, batch=32)
    print(f"{options.batch} images per step, {options.steps} steps, {time.strftime('%F')}\n")
    print(reading(Case(options.data, 1, "fp32", options.batch)) + "\n")
    others = [name for name in LOOPS if name != "ours"]
    harness.head("case", *(f"{name}, CPU s per step" for name in LOOPS), *(f"speed of ours by {name}'s" for name in others))
    for precision in options.precisions:
        for stage in options.stages:
            spent = seconds(Case(options.data, stage, precision, options.batch), options.steps)
            ratios = [[b / a for a, b in zip(spent["ours"], spent[name], strict=True)] for name in others]
            harness.row(f"ZeRO-{stage}, {precision}", *map(harness.spread, spent.values()), *map(harness.spread, ratios))


if __name__ == "__main__":
    main()
