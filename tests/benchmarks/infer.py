"""Compares tokens per second of `heliostat model infer` on one core with a plain loop of transformers, interleaved.

    python -m tests.benchmarks.infer MODEL [--prompts 64] [--tokens 32] [--rounds 5]

MODEL is an exported folder, as `heliostat model export RUN OUT` writes it. Both use the same prompts of 3 to 40 words, and sample
at temperature 0.8. Seconds are CPU time, without loading the model. docs/benchmarks/batch-inference.md has the table.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from heliostat.inference.batch.engines import Continue, Input
from heliostat.recipes.text.server import continue_text

from tests.benchmarks import harness

WORDS = ("def", "import", "class", "return", "self", "for", "in", "if", "else", "print", "open", "file", "name", "value", "the")
LOOP = "a plain loop"


def main() -> None:
    given = harness.arguments(__doc__, model=Path, prompts=64, tokens=32, rounds=5)
    torch.set_num_threads(1)
    draw = random.Random(0)
    prompts = [Input(" ".join(draw.choices(WORDS, k=draw.randint(3, 40))), seed) for seed in range(given.prompts)]
    engines = {batch: Continue(given.model, batch, {"max_tokens": given.tokens}) for batch in (1, 4, 16, 64)}
    ways = {LOOP: paced(lambda: loop(engines[1], prompts, given.tokens))}
    ways |= {f"batches of {batch}": paced(lambda engine=engine: batched(engine, prompts)) for batch, engine in engines.items()}
    paces = harness.by_turns(ways, given.rounds)
    harness.head("way", "tokens/s a core: median (minimum to maximum)", "times the loop")
    for name, rates in paces.items():
        harness.row(name, harness.spread(rates, ".0f"), f"{median(rates) / median(paces[LOOP]):.2f}")


def paced(work: Callable[[], int]) -> Callable[[], float]:
    """Returns a function that measures tokens per CPU second of such work."""

    def pace() -> float:
        began = time.process_time()
        return work() / (time.process_time() - began)

    return pace


def loop(engine: Continue, prompts: list[Input], tokens: int) -> int:
    texts = (continue_text(engine.model, engine.tokenizer, p.text, tokens, 0.8, 0.95, p.seed % 2**31) for p in prompts)
    return sum(len(engine.tokenizer(text)["input_ids"]) for text in texts)


def batched(engine: Continue, prompts: list[Input]) -> int:
    return sum(answer.values["tokens"] for answer in engine(prompts))


if __name__ == "__main__":
    main()
