"""Trains jobs through DeepSpeed on the simulated device and on the CPU: steps, a save, scores of averaged weights, and a
resume."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from heliostat.config.averages import Ema
from heliostat.engine import deepspeed_engine
from heliostat.engine.ema import AveragedWeights
from heliostat.numerics import play
from heliostat.training.worker.evaluation import HeldOut

from tests.integration import layouts
from tests.twin import cases, device, traffic

SAVED, STEPS = 2, 3
OFFLOADED = {"": (), "optimizer": ("optimizer",), "full": ("optimizer", "param")}


@dataclass(frozen=True)
class Setup:
    """Describes a job: a case of `cases`, a ZeRO stage, and its other changes. `within`: `train.zero.shard_group_size`."""

    case: str
    stage: int
    offload: str = ""
    precision: str = "fp32"
    optimizer: str = "adamw"
    within: int | None = None

    def __str__(self) -> str:
        words = [self.case, f"ZeRO-{self.stage}", f"{self.offload} offload" if self.offload else "", self.precision]
        words += [self.optimizer if self.optimizer != "adamw" else "", f"groups of {self.within}" if self.within else ""]
        return ", ".join(filter(None, words))

    def trains_on(self, workers: int) -> bool:
        """Returns whether so many workers train it: two groups if there are groups, else one or two workers."""
        return workers == 2 * self.within if self.within else workers <= 2

    def player(self, folder: Path, gpus: int) -> play.Player:
        """Returns a worker of the job."""
        offload = dict.fromkeys(OFFLOADED[self.offload], "cpu")
        words = re.findall("[a-z0-9]+", f"{self} {'twin' if gpus else 'cpu'} {dist.get_world_size()}".lower())
        changes = {
            "name": "-".join(words), "workers.count": dist.get_world_size(), "workers.gpus": gpus, "train.zero.stage": self.stage,
            "train.precision": self.precision, "train.zero.offload": offload, "train.steps": STEPS,
            "train.optimizer": {"name": "adamw", "lr": 1e-3, "eps": 1e-4},
            "train.micro_batch_size": 2 if dist.get_world_size() == 1 else 1,
        }  # fmt: skip
        if self.within:
            changes["train.zero.shard_group_size"] = self.within
        if self.optimizer != "adamw":
            changes["train.optimizer"] = {"name": self.optimizer, "lr": 1e-3}
            changes["train.schedule"] = {"name": "constant", "warmup_steps": 1}  # which schedule_free wants
        if self.stage == 3:
            changes["train.deepspeed"] = layouts.SMALL_STAYS_DIVIDED
        return layouts.player(cases.made(self.case, folder, **changes))


def step(one: play.Player, number: int) -> None:
    """Makes a step like the training loop."""
    mine = one.sharing.share(one._read)
    one.stepper.step(number, one.stepper.prepare(number, mine))
    one.unsealed.add(number, mine)


def trained(setup: Setup, folder: Path, on_twin: bool) -> dict[str, Any]:
    """Trains, saves, evaluates, and resumes; returns the numbers, and the traffic in the third step and in the evaluation."""
    one = setup.player(folder, int(on_twin))
    assert (one.device.type == "cuda") is on_twin
    step(one, 0)
    step(one, 1)
    saved = play.state(one.engine)
    one.save(SAVED)
    average = AveragedWeights(one.engine, Ema(decay=0.5))
    with traffic.recorded() as seen:
        step(one, 2)
        average.update(STEPS)
    one.engine.eval()
    held_out = HeldOut(one.job, one.dataset, one.recipe, one.sharing)
    with average.applied():
        scores = held_out.scores(one.engine, one.device, one.control, lambda: None)
        with traffic.recorded() as scored:
            assert held_out.scores(one.engine, one.device, one.control, lambda: None) == scores
    one.engine.train()
    one.load(one.job.run_folder, SAVED)
    restored = play.state(one.engine)
    different = [name for name in saved if not saved[name].cpu().equal(restored[name].cpu())]
    step(one, 2)
    losses = torch.stack(one.stepper.losses).double()
    dist.all_reduce(losses)
    numbers = {"losses": losses.tolist(), "norms": list(map(float, one.stepper.norms)), "scores": scores, "different": different}
    crossed = {"crossings": _listed(seen), "scored": _listed(scored)}
    return numbers | crossed | {"parameters": len(list(one.engine.module.parameters()))}


def _listed(seen: traffic.Traffic) -> list[dict[str, Any]]:
    return [{**crossing._asdict(), "count": n} for crossing, n in seen.crossings.items()]


def trained_in_ranks(group: Any, everyone: Any, folder: str, on_twin: str, *setups: str) -> Iterator[dict[str, Any]]:
    """In every rank, trains these setups, given as JSON of their fields, one after another."""
    if on_twin == "twin":
        device.start_deepspeed()
    for setup in (Setup(**json.loads(described)) for described in setups):
        if not setup.trains_on(dist.get_world_size()):
            continue
        try:
            yield {"setup": str(setup), **trained(setup, Path(folder), on_twin == "twin")}
        finally:
            deepspeed_engine.destroy_engines()
            deepspeed_engine.forget_groups()
