"""Runs the reference: plain PyTorch DDP with the data already in memory. Started by train_overhead.py through torchrun.

    torchrun --nproc-per-node 2 tests/benchmarks/yardsticks/plain_ddp.py JOB.yaml STEPS

Prints the end and the seconds of every step. bf16 is torch's autocast.
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from heliostat.data.dataset import open_dataset
from heliostat.validation import check

from tests.benchmarks.yardsticks import turns


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    steps = int(sys.argv[2])
    checked = check.check(check.load_job(Path(sys.argv[1]), sys.argv[3:]))
    job, recipe, dataset = checked.job, checked.recipe, open_dataset(checked.plan)
    per_rank = job.train.global_batch_size // world
    torch.manual_seed(job.train.seed)
    model = torch.nn.parallel.DistributedDataParallel(recipe.build(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.optimizer.lr, fused=True)
    contents = [dataset.read(dataset.order.locate(dataset.order.step(s).ravel())) for s in range(steps)]
    batches = [torch.from_numpy(c[rank * per_rank : (rank + 1) * per_rank]).long() for c in contents]
    micro = job.train.micro_batch_size
    for tokens in batches:
        started = time.time()
        parts = tokens.split(micro)
        for i, part in enumerate(parts):
            model.require_backward_grad_sync = i + 1 == len(parts)
            with torch.autocast("cpu", torch.bfloat16, enabled=job.train.precision == "bf16"):
                loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            now = time.time()
            turns.Step(now, now - started).tell()


main()
