"""Steps of a small language model on one CPU thread, with `train.cpu_kernels` and without (docs/benchmarks/train-overhead.md).

    python tests/benchmarks/cpu_kernels.py [--rounds 12]

Processor time, forwards and backwards, of 8 samples of 256 tokens, a Llama of 17M parameters. The two take turns, so that a
machine that is busy with other things slows both alike; the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from heliostat import cpu_kernels  # noqa: E402
from heliostat.recipes.text.causal_lm import CausalLM  # noqa: E402
from heliostat.validation.check import load_job  # noqa: E402

MODEL = {"arch": "llama", "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "intermediate_size": 1024, "vocab_size": 4096}  # fmt: skip
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case:
    def __init__(self, precision: str, on: bool) -> None:
        keys = [f"model={MODEL}", f"train.precision={precision}", f"train.cpu_kernels={str(on).lower()}"]
        job = load_job(ROOT / "jobs/quickstart.yaml", keys)
        self.recipe = CausalLM(job)
        torch.manual_seed(0)
        self.model = self.recipe.build().to(TYPES[precision])
        cpu_kernels.use(self.model, job, self.recipe.causal)
        self.batch = self.recipe.batch(torch.randint(0, 4096, (8, 256)).int().numpy())

    def seconds(self) -> float:
        began = time.process_time()
        self.recipe.loss(self.model, self.batch).sum.backward()
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| precision | on, s | off, s | off / on: median of the pairs (least to most) |\n|---|---|---|---|")
    for precision in TYPES:
        on, off = Case(precision, True), Case(precision, False)
        pairs = [(on.seconds(), off.seconds()) for _ in range(rounds + 1)][1:]  # the first of each makes its memory
        ratios = sorted(b / a for a, b in pairs)
        times = [median(p[i] for p in pairs) for i in (0, 1)]
        print(f"| {precision} | {times[0]:.2f} | {times[1]:.2f} | {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main()
