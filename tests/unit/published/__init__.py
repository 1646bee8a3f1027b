"""Published training runs, and the operations of their models as the plan counts them: real modules, on fake tensors."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from heliostat.plan import hardware, model_stats, step_time, traffic
from heliostat.plan.counts import OperationWork
from heliostat.recipes.protocol import Loss

from tests.unit.build_job import job

HERE = Path(__file__).parent
TABLE: dict[str, Any] = yaml.safe_load((HERE / "runs.yaml").read_text())
RUNS: list[dict[str, Any]] = TABLE["runs"]
COUNTED = HERE / "operations.json"  # made by `python -m tests.benchmarks.plan_published --count`


class Denoiser:
    """A diffusion model with its own loss, as a recipe that the plan can count."""

    causal = False

    def __init__(self, keys: dict[str, Any]) -> None:
        self.keys = {k: v for k, v in keys.items() if k not in ("diffusers", "text", "attention")}
        self.kind, self.text, self.eager = keys["diffusers"], keys.get("text"), keys.get("attention") == "eager"

    def build(self) -> Any:
        import diffusers

        model = getattr(diffusers, self.kind)(**self.keys)
        if self.eager:  # written out: two products and a softmax
            for block in model.transformer_blocks:
                block.attn1.set_processor(diffusers.models.attention_processor.AttnProcessor())
        return model

    def batch(self, content: list[int], _: Any) -> dict[str, torch.Tensor]:
        size, rows = self.keys["sample_size"], len(content)
        made = {"x": torch.zeros(rows, 4, size, size), "timestep": torch.zeros(rows, dtype=torch.long)}
        return made | ({"text": torch.zeros(rows, *self.text)} if self.text else {"label": torch.zeros(rows, dtype=torch.long)})

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> Loss:
        dtype = next(model.parameters()).dtype
        given = {"encoder_hidden_states": batch["text"].to(dtype)} if self.text else {"class_labels": batch["label"]}
        said = model(batch["x"].to(dtype), timestep=batch["timestep"], return_dict=False, **given)[0]
        return Loss(said.float().square().sum())


def count(name: str, length: int | None) -> dict[str, Any]:
    """Counts a model of the table: its parameters, its FLOPs a sample as the plan says them, and its operations."""
    keys = TABLE["models"][name]
    if "diffusers" in keys:
        j, recipe = job(**{"workers.gpus": 1, "train.precision": "bf16"}), Denoiser(keys)
        with torch.device("meta"):
            model = recipe.build()
        contents: Any = ([0] * 2, [0] * 3)
    else:
        from heliostat.recipes.text.causal_lm import CausalLM

        j = job(model=keys, **{"workers.gpus": 1, "train.precision": "bf16", "data.sequence_length": length})
        recipe = CausalLM(j)
        model = model_stats.build(recipe)
        contents = tuple(np.zeros((n, length), dtype=np.int32) for n in (2, 3))
    numel = sum(p.numel() for p in model.parameters())
    work = model_stats.work(j, recipe, model, contents)
    return {"parameters": numel, "work": [astuple(w) for w in work]}


def key(run: dict[str, Any]) -> str:
    return f"{run['model']} {run.get('length', '')}".strip()


@cache
def counted() -> dict[str, tuple[int, tuple[OperationWork, ...]]]:
    found = json.loads(COUNTED.read_text())
    return {name: (c["parameters"], tuple(OperationWork(*w) for w in c["work"])) for name, c in found.items()}


def machine(run: dict[str, Any], prices: dict[str, Any]) -> hardware.Device:
    """The device of a run: the table's, with what its source says of memory and network."""
    said = dict(TABLE["machines"].get(run["device"], {"device": run["device"]}))
    name = said.pop("device")
    prices = {**prices, "devices": {**prices["devices"], name: {**prices["devices"][name], **said}}}
    return hardware.resolve(job(**{"workers.gpus": 1, "train.precision": "bf16"}), prices, name)


def planned(run: dict[str, Any], prices: dict[str, Any]) -> float:
    """What the plan says of a run: tokens or images a second and device."""
    numel, work = counted()[key(run)]
    workers, accumulation, micro = run["workers"], math.ceil(run["accumulation"]), run["micro_batch"]
    setting = step_time.Setting(workers, run["stage"], micro, accumulation, run["replayed"], run.get("compile", False))
    device = machine(run, prices)
    moved = traffic.Traffic(traffic.volume(numel, 2, workers, run["stage"], accumulation), workers)
    updated = step_time.updating(numel / workers, 2, device)
    took = step_time.step(step_time.computing(work, setting, device), moved, updated, setting, device, hardware.network(prices))
    return micro * accumulation * run.get("length", 1) / took.total


def error(run: dict[str, Any], prices: dict[str, Any]) -> float:
    """How far the planned time is from the measured one, as a share: above 0 where the plan is too slow."""
    return run["measured"] / planned(run, prices) - 1
