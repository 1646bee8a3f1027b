"""Tokens a second of `heliostat infer` on one core against a plain loop of transformers over the same prompts, by turns.

    python tests/benchmarks/infer.py MODEL [--prompts 64] [--tokens 32] [--rounds 5]

MODEL is an exported folder, as `heliostat export RUN OUT` writes. The prompts are 3 to 40 words; both sample at temperature 0.8.
The seconds are processor time, without loading the model. docs/batch-inference.md has the table.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median

import torch
from heliostat.inference.batch.engines import Continue, Input
from heliostat.recipes.text.server import continue_text

WORDS = ("def", "import", "class", "return", "self", "for", "in", "if", "else", "print", "open", "file", "name", "value", "the")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)
    prompts = [Input(" ".join(draw.choices(WORDS, k=draw.randint(3, 40))), seed) for seed in range(given.prompts)]
    engines = {batch: Continue(given.model, batch, {"max_tokens": given.tokens}) for batch in (1, 4, 16, 64)}
    plain = engines[1]
    ways = {"a plain loop": lambda: loop(plain, prompts, given.tokens)}
    ways |= {f"batches of {batch}": lambda engine=engine: batched(engine, prompts) for batch, engine in engines.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            began = time.process_time()
            tokens = way()
            found[name].append(tokens / (time.process_time() - began))
    print("| way | tokens/s a core, median | least | most | times the loop |\n|---|---:|---:|---:|---:|")
    base = median(found["a plain loop"])
    for name, rates in found.items():
        print(f"| {name} | {median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} | {median(rates) / base:.2f} |")


def loop(engine: Continue, prompts: list[Input], tokens: int) -> int:
    total = 0
    for one in prompts:
        text = continue_text(engine.model, engine.tokenizer, one.text, tokens, 0.8, 0.95, one.seed % 2**31)
        total += len(engine.tokenizer(text)["input_ids"])
    return total


def batched(engine: Continue, prompts: list[Input]) -> int:
    return sum(answer.values["tokens"] for answer in engine(prompts))


if __name__ == "__main__":
    main()
