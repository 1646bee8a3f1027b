"""Runs the same loop of torch over the exact stream or over a bare loader. Started by stream_overhead.py.

    python -m tests.benchmarks.yardsticks.one_loop exact|bare DATASET FOLDER STEPS

One process of one thread trains a Llama of 2.2M parameters. `bare`: torch's DataLoader with one process, over tokens in memory.
`exact`: Ray, Ray Data, digests, and a receipt every 50 steps. Writes a line for every step.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import heliostat
import ray
import torch
import torch.distributed as dist
from heliostat.data.dataset import open_dataset
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.yardsticks import turns

BATCH, LENGTH, EVERY = 8, 128, 50
IN_MEMORY = 4096  # samples that the bare loader draws from


def exact(stream: heliostat.ExactStream) -> Iterator[torch.Tensor]:
    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")
    feed = stream.start()
    for batch in feed:
        yield torch.from_numpy(batch.content)
        if batch.step % EVERY == 0 or batch.step == stream.steps:
            feed.receipt()


def bare(stream: heliostat.ExactStream) -> Iterator[torch.Tensor]:
    dataset = open_dataset(stream.plan)
    steps = range(min(stream.steps, IN_MEMORY // BATCH))
    samples = torch.cat([torch.from_numpy(dataset.read(dataset.order.locate(dataset.order.step(s).ravel()))) for s in steps])
    loader = DataLoader(TensorDataset(samples), BATCH, shuffle=True, num_workers=1, persistent_workers=True)
    while True:
        for (tokens,) in loader:
            yield tokens


def main() -> None:
    kind, data, folder, steps = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
    job = {"sources": [{"path": data}], "sequence_length": LENGTH, "seed": 17}
    stream = heliostat.datasets(job, steps=steps, global_batch_size=BATCH, folder=str(folder / "stream"))
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 344}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = {"exact": exact, "bare": bare}[kind](stream)
    ended = time.time()
    for tokens in batches:
        inputs = tokens.long()
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now = time.time()
        turns.Step(now, now - ended).tell()
        ended = now


main()
