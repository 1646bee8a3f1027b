"""Compares each step of DPO, in heliostat and in TRL, with TRL's trainer in fp64 from the same weights.

The comparison of `fine_tuning` mixes two causes: errors of a step, and weights that AdamW has moved apart. Here, TRL's trainer in
fp64 gets the weights with which each step began, so only the step's own error is left.

    python -m tests.benchmarks.fine_tuning_exact --trl FOLDER     # FOLDER: see `fine_tuning`
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
from transformers import LlamaForCausalLM

from tests.benchmarks import fine_tuning, harness
from tests.benchmarks.fine_tuning import BETA, COMPARED, ROWS, Steps, apart, keep


class WeighedSteps(Steps):
    """Keeps the weights with which each step begins. If `given` names a file of such weights, each step begins with these."""

    def __init__(self, kept: str, given: str) -> None:
        super().__init__(kept)
        self.given = np.load(given) if given else None
        self.weights = list[dict[str, torch.Tensor]]()

    @torch.no_grad()
    def on_step_begin(self, *arguments: Any, model: torch.nn.Module, **named: Any) -> None:
        super().on_step_begin(*arguments, model=model, **named)
        for name, parameter in model.named_parameters():
            if self.given is not None:
                parameter.copy_(torch.from_numpy(self.given[f"{len(self.weights)}/{name}"]))
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})


class ExactHead:
    """Computes the log-probabilities of tokens in the model's precision; TRL's own head uses fp32. Values that TRL only logs are
    0."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, bias: None, targets: torch.Tensor, *more: Any) -> tuple[Any, ...]:
        scores = (hidden @ weight.T).log_softmax(-1)
        logprobs = scores.gather(1, targets.unsqueeze(1)).squeeze(1)
        logged = torch.zeros_like(logprobs)
        return logprobs, logged, logged, logged, logged.bool()


def heliostat(folder: str, steps: int, kept: str) -> list[float]:
    """Trains with the steps of a worker. Writes gradients to `kept`, and weights next to it. Returns the losses."""
    from heliostat.engine import deepspeed_engine, process_group
    from heliostat.numerics import play

    from tests.integration import layouts

    torch.set_num_threads(1)
    deepspeed_engine.prepare_environment(0)
    process_group.join(process_group.WorkerPlace(0, 1, 0, 1, f"file://{folder}-group-{time.time_ns()}", "gloo", ()))
    player = layouts.player(fine_tuning.described(folder, "pairs", steps, {}))
    losses, weights, gradients = list[float](), list[dict[str, torch.Tensor]](), list[dict[str, torch.Tensor]]()
    play.watch(player.engine, gradients.append)
    for step in range(steps):
        weights.append(play.masters(player.engine))
        losses += player.losses(step, step + 1)
    keep(kept, gradients)
    keep(of_weights(kept), weights)
    process_group.leave()
    return losses


def trl(folder: str, steps: int, kept: str, given: str = "") -> list[float]:
    """Trains with DPOTrainer, which computes the reference itself. `given`: the weights of each step, in fp64."""
    import datasets
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    torch.set_num_threads(1)
    if given:
        utils._ChunkedLogProbFunction = ExactHead
    rows = [row for table in fine_tuning.in_order(folder, "pairs", steps) for row in table.to_pylist()]
    made = [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    model, reference = (
        LlamaForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float64 if given else torch.float32) for _ in range(2)
    )
    watch = WeighedSteps(kept, given)
    trainer = fine_tuning.in_their_order(DPOTrainer)(
        model, ref_model=reference, processing_class=fine_tuning.tokenizer(folder), callbacks=[watch],
        args=DPOConfig(**fine_tuning.settings(folder, "pairs", steps), beta=BETA), train_dataset=datasets.Dataset.from_list(made),
    )  # fmt: skip
    trainer.train()
    keep(kept, watch.gradients)
    keep(of_weights(kept), watch.weights)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def of_weights(kept: str) -> str:
    return kept.replace(".npz", "-weights.npz")


def main() -> None:
    asked = harness.arguments(__doc__, trl="")
    if not asked.trl:
        sys.exit("--trl: required. Install TRL into a folder, and pass this folder")
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/made"
        Path(folder).mkdir()
        call = partial(harness.apart, PYTHONPATH=f"{harness.ROOT}/platform:{harness.ROOT}:{Path(asked.trl).absolute()}")
        call(fine_tuning.prepare, folder, ROWS)
        kept = {name: f"{folder}/{name}.npz" for name in ("heliostat", "trl", "heliostat-exact", "trl-exact")}
        losses = {"heliostat": call(heliostat, folder, COMPARED, kept["heliostat"])[0]}
        losses["trl"] = call(trl, folder, COMPARED, kept["trl"])[0]
        for name in ("heliostat", "trl"):
            losses[f"{name}-exact"] = call(trl, folder, COMPARED, kept[f"{name}-exact"], of_weights(kept[name]))[0]
        harness.head("DPO", "largest relative difference of losses", "of gradients, by step")
        for name, one, other in (
            ("heliostat and TRL, each with its own weights", "heliostat", "trl"),
            ("heliostat and TRL in fp64, the same weights", "heliostat", "heliostat-exact"),
            ("TRL and TRL in fp64, the same weights", "trl", "trl-exact"),
        ):
            of_losses = max(abs(a - b) / b for a, b in zip(losses[one], losses[other], strict=True))
            harness.row(name, f"{of_losses:.1e}", ", ".join(f"{value:.1e}" for value in apart(kept[one], kept[other])))


if __name__ == "__main__":
    main()
