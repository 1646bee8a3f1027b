"""Measures what a small model learns in a given CPU time, by its options: held-out bits per byte, one choice at a time.

    python -m tests.benchmarks.quickstart_options [--seconds 20 60] [--seeds 1 2] [--only AdamW bf16] \
        [--also 'NAME: KEY=VALUE; KEY=VALUE']

One process of one thread, without Ray: the job of `jobs/quickstart.yaml` with the settings of a row of OPTIONS, its recipe, its
data order, and heliostat's engine of one worker. A row's schedule follows the CPU time of its steps, so every row ends at the
same second with a complete schedule. Scores are on all held-out samples, and bits per byte are comparable across vocabularies.
Datasets with other vocabularies are prepared first, next to the quickstart's.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from heliostat.engine import deepspeed_engine

from tests.benchmarks import harness, one_process
from tests.gpu import setting

JOB = harness.ROOT / "jobs/quickstart.yaml"
FOUR_LAYERS = ["model.num_hidden_layers=4", "model.num_key_value_heads=4"]
WIDER = ["model.hidden_size=160", "model.num_attention_heads=5", "model.num_key_value_heads=1", "model.intermediate_size=432"]
OPTIONS: dict[str, list[str]] = {  # each changes one thing of the job
    "jobs/quickstart.yaml": [],
    "AdamW, 4e-3": ["train.optimizer={name: adamw, lr: 4.0e-3}"],
    "one learning rate": ["train.optimizer.adamw_lr=8.0e-3"],
    "cosine to 0.1": ["train.schedule={name: cosine, warmup_steps: 20, final_ratio: 0.1}"],
    "Llama: no norms of queries and keys": ["model.arch=llama"],
    "4 layers": FOUR_LAYERS,
    "2 layers of 160": WIDER,
    "keys for every head": ["model.num_key_value_heads=4"],
    "one matrix for input and output": ["model.tie_word_embeddings=true"],
    "output projections of zeros": ["model.init={zero_output_projections: true}"],
    "vocabulary of 1,024": ["vocabulary=1024"],
    "vocabulary of 4,096": ["vocabulary=4096"],
    "twice the batch": ["train.global_batch_size=32"],
    "samples of 256 tokens": ["data.sequence_length=256", "train.global_batch_size=8", "train.micro_batch_size=4"],
    "bf16": ["train.precision=bf16"],
}


def dataset(vocabulary: str) -> Path:
    """Returns the folder of the quickstart's dataset with another vocabulary; prepares it if it is missing."""
    folder = harness.ROOT / f".heliostat/data/quickstart-{vocabulary}"
    settings = {"output": str(folder), "tokenizer.vocab_size": vocabulary}
    harness.heliostat("data", "prepare", "pipelines/quickstart.yaml", *harness.sets(settings))
    return folder


def checked(settings: list[str], seed: int, samples: int) -> Any:
    given = dict(s.split("=", 1) for s in settings)
    vocabulary = given.pop("vocabulary", None)
    keys = [f"{k}={v}" for k, v in given.items()]
    keys += [f"train.seed={seed}", f"data.seed={seed}", f"evaluate.samples={samples}"]
    if vocabulary:
        keys.append(f"data.sources.0.path={dataset(vocabulary)}")
    return one_process.checked(JOB, keys)


def play(made: Any, seconds: float) -> tuple[float, float]:
    """Trains for so many CPU seconds; returns tokens per second, and held-out bits per byte at the end."""
    engine, steps, spent = one_process.train(made, lambda _, spent: spent / seconds)
    found = one_process.scores(made, engine, made.order.held_out(made.job.evaluate.samples))["bits_per_byte"]
    deepspeed_engine.destroy_engines()
    return steps * made.job.train.global_batch_size * made.job.data.sequence_length / spent, found


def main() -> None:
    asked = harness.arguments(
        __doc__, seconds=[20.0, 60.0], seeds=[1, 2], samples=1_000_000, only={"nargs": "*", "help": "rows of OPTIONS"},
        set={"nargs": "*", "default": [], "metavar": "KEY=VALUE", "help": "of all rows, such as a smaller batch"},
        also={"nargs": "*", "default": [], "metavar": "NAME: KEY=VALUE; ...", "help": "rows that are not in OPTIONS"},
    )  # fmt: skip
    torch.set_num_threads(1)
    setting.start()
    rows = {name: settings for name, settings in OPTIONS.items() if asked.only is None or name in asked.only}
    rows |= {name: rest.split("; ") for name, _, rest in (line.partition(": ") for line in asked.also)}
    rows = {name: [*asked.set, *settings] for name, settings in rows.items()}
    print("held-out bits a byte, mean of the seeds (each), by processor time")
    harness.head("", "parameters", "tokens/s", *(f"{seconds:g} s" for seconds in asked.seconds))
    for name, settings in rows.items():
        seeds = [checked(settings, seed, asked.samples) for seed in asked.seeds]
        with torch.device("meta"):
            size = sum(p.numel() for p in seeds[0].recipe.build().parameters())
        ends = [[play(made, seconds) for made in seeds] for seconds in asked.seconds]
        cells = [f"{mean(b for _, b in end):.3f} ({', '.join(f'{b:.3f}' for _, b in end)})" for end in ends]
        speed = mean(tokens for end in ends for tokens, _ in end)
        harness.row(name, f"{size:,}", f"{speed:,.0f}", *cells)


if __name__ == "__main__":
    main()
