"""Runs the reference: the training loop of diffusers' own examples, with accelerate's DDP and everything in memory.

    torchrun --nproc-per-node 2 tests/benchmarks/yardsticks/plain_diffusers.py JOB.yaml

The model and the samples are those of the job, repeated. Prints the end and the seconds of every step, until it is killed.
"""

import contextlib
import itertools
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from heliostat.data.dataset import open_dataset
from heliostat.recipes.images import rows
from heliostat.recipes.images.pipeline import tokenize
from heliostat.validation import check

from tests.benchmarks.yardsticks import turns


def main() -> None:
    torch.set_num_threads(1)
    checked = check.check(check.load_job(Path(sys.argv[1])))
    precision = checked.job.train.precision
    accelerator = Accelerator(cpu=True, mixed_precision="no" if precision == "fp32" else precision)
    job, recipe, dataset = checked.job, checked.recipe, open_dataset(checked.plan)
    per_rank = job.train.global_batch_size // accelerator.num_processes
    torch.manual_seed(job.train.seed)
    model = recipe.build()
    average = EMAModel(model.parameters(), decay=job.train.ema.decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.optimizer.lr, fused=True)
    scheduler = recipe.process.scheduler("ddpm")
    batches = []
    for step in range(job.train.steps):
        content = dataset.read(dataset.order.locate(dataset.order.step(step).ravel()))
        mine = content.slice(accelerator.process_index * per_rank, per_rank)
        batches.append((rows.pixels(mine), tokenize(recipe.parts.tokenizers[0], mine["caption"].to_pylist()).input_ids))
    empty = recipe.parts.empty["text"]
    model, optimizer = accelerator.prepare(model, optimizer)
    micro = job.train.micro_batch_size
    for clean, text in itertools.chain.from_iterable(itertools.repeat(batches)):
        started = time.time()
        for at in range(0, per_rank, micro):
            quiet = accelerator.no_sync(model) if at + micro < per_rank else contextlib.nullcontext()
            with quiet:
                image, ids = clean[at : at + micro], text[at : at + micro]
                noise = torch.randn_like(image)
                t = torch.randint(0, scheduler.config.num_train_timesteps, (len(image),))
                ids = torch.where(torch.rand(len(image), 1) < recipe.model.caption_dropout, empty, ids)
                said = model(scheduler.add_noise(image, noise, t), t, ids)
                loss = F.mse_loss(said.float(), scheduler.get_velocity(image, noise, t))
                accelerator.backward(loss * micro / per_rank)
        accelerator.clip_grad_norm_(model.parameters(), job.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        if accelerator.is_main_process:
            now = time.time()
            turns.Step(now, now - started).tell()


main()
