"""Compares training of LoRA adapters with TRL's SFTTrainer: losses, CPU seconds per step, and peak memory.

Both train the same adapter on the same samples of random tokens, in one process with one thread, fp32, AdamW. Each run is a
process of its own, and the ways take turns. TRL must be installed in an environment with heliostat's packages:

    python -m tests.benchmarks.adapters --trl FOLDER     # FOLDER: `pip install --no-deps --target FOLDER trl==1.16.0`
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests.benchmarks import harness

MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 8192}
LENGTH, BATCH, MICRO, SEED, LR = 256, 8, 2, 7, 1e-3
EPS = 1e-5  # of AdamW: with the usual 1e-8, AdamW turns the rounding of tiny gradients into updates
SKIPPED = 2  # steps that warm up, and don't count
WAYS: dict[str, dict[str, Any]] = {"heliostat": {}, "heliostat, base in 4 bits": {"model.adapter.base": "nf4"}}


def samples(steps: int) -> np.ndarray:
    """Draws tokens from a distribution in which the model can learn the frequencies, int32 [samples, LENGTH]."""
    draw = np.random.default_rng(SEED).zipf(1.3, (steps * BATCH, LENGTH))
    return np.minimum(draw, MODEL["vocab_size"] - 1).astype(np.int32)


def base(folder: str) -> None:
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)


def _result(losses: list[float], seconds: list[float], before: float) -> dict[str, Any]:
    counted = sorted(seconds[SKIPPED:])
    return {"losses": losses, "step": counted[len(counted) // 2], "peak": harness.memory("VmHWM") - before}


def heliostat(folder: str, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    from heliostat.engine import deepspeed_engine, process_group
    from heliostat.recipes.text.causal_lm import CausalLM

    from tests.unit.build_job import job

    torch.set_num_threads(1)
    keys = {"data.sequence_length": LENGTH, "train.global_batch_size": BATCH, "train.micro_batch_size": MICRO}
    keys |= {"train.precision": "fp32", "train.seed": SEED, "workers.count": 1, "train.grad_clip": 1.0, "train.zero.stage": 1}
    keys |= {"train.optimizer": {"name": "adamw", "lr": LR, "betas": [0.9, 0.999], "eps": EPS, "weight_decay": 0.0}}
    keys |= {"model": {"pretrained": folder, "adapter": {"rank": 16}}, **changes}
    made, losses, seconds = job(**keys), list[float](), list[float]()
    recipe, before = CausalLM(made), harness.memory("VmRSS")
    harness.forget_peak()
    deepspeed_engine.prepare_environment(0)
    process_group.join(process_group.WorkerPlace(0, 1, 0, 1, f"file://{folder}-group-{time.time_ns()}", "gloo", ()))
    engine = deepspeed_engine.build_engine(made, recipe)
    for rows in np.split(samples(steps), steps):
        began, total = time.process_time(), 0.0
        deepspeed_engine.set_lr(engine, LR)
        for part in np.split(rows, BATCH // MICRO):
            batch = recipe.batch(part)
            loss = recipe.loss(engine, batch).sum / recipe.terms(batch)  # the engine averages micro-batches
            engine.backward(loss)
            engine.step()
            total += loss.item() * MICRO / BATCH
        seconds.append(time.process_time() - began)
        losses.append(total)
    process_group.leave()
    return _result(losses, seconds, before)


class Steps(TrainerCallback):
    """Measures the CPU seconds of each step."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, list[float]()

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def trl(folder: str, steps: int) -> dict[str, Any]:
    """Trains with TRL. The first A of each layer is heliostat's, because peft draws other random numbers."""
    import datasets
    from heliostat.recipes import adapters
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        """Reads the samples in their order."""

        def _get_train_sampler(self, *given: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    torch.set_num_threads(1)
    tokens = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(MODEL["vocab_size"])}, unk_token="<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<1>", pad_token="<2>")
    rows = datasets.Dataset.from_dict({"input_ids": samples(steps).tolist()})
    settings = SFTConfig(
        output_dir=f"{folder}-trl", per_device_train_batch_size=MICRO, gradient_accumulation_steps=BATCH // MICRO,
        max_steps=steps, learning_rate=LR, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0,
        adam_epsilon=EPS, max_grad_norm=1.0, logging_steps=1, gradient_checkpointing=False, bf16=False, max_length=LENGTH,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora, watch, before = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"), Steps(), harness.memory("VmRSS")
    harness.forget_peak()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = InOrder(model, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora, callbacks=[watch])
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if name.endswith(adapters.DOWN):
                layer = name.removeprefix("base_model.model.").removesuffix(f".{adapters.DOWN}")
                p.copy_(adapters.first_down(SEED, layer, tuple(p.shape)))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return _result(losses, watch.seconds, before)


def main() -> None:
    asked = harness.arguments(__doc__, trl="", steps=10, rounds=3)
    if not asked.trl:
        sys.exit("--trl: required. Install TRL into a folder, and pass this folder")
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/base"
        harness.apart(base, folder)
        path = f"{harness.ROOT}/platform:{harness.ROOT}:{Path(asked.trl).absolute()}"
        ways = {
            name: partial(harness.apart, heliostat, folder, asked.steps, changes, PYTHONPATH=path)
            for name, changes in WAYS.items()
        }
        ways["TRL"] = partial(harness.apart, trl, folder, asked.steps, PYTHONPATH=path)
        found = {name: [result for result, _ in runs] for name, runs in harness.by_turns(ways, asked.rounds).items()}
    harness.head("", "CPU s per step", "tokens per CPU s", "peak MiB above imports", "first and last loss")
    for name, runs in found.items():
        speeds, losses = [BATCH * LENGTH / run["step"] for run in runs], runs[0]["losses"]
        cells = [harness.spread([run["step"] for run in runs]), harness.spread(speeds, ".0f")]
        harness.row(name, *cells, harness.spread([run["peak"] for run in runs], ".0f"), f"{losses[0]:.6f}, {losses[-1]:.6f}")
    right = found["TRL"][0]["losses"]
    apart = [abs(a - b) / b for a, b in zip(found["heliostat"][0]["losses"], right, strict=True)]
    print(f"relative differences between heliostat's and TRL's losses, by step: {', '.join(f'{one:.1e}' for one in apart)}")


if __name__ == "__main__":
    main()
