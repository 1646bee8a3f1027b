"""Lists published training runs, and the operations of their models as the plan counts them: real modules on fake tensors."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from heliostat.config.spec import Job
from heliostat.plan import hardware, memory, model_stats, step_time, traffic
from heliostat.plan.counts import OperationWork
from heliostat.recipes.protocol import Loss

from tests.unit.build_job import job

HERE = Path(__file__).parent
TABLE: dict[str, Any] = yaml.safe_load((HERE / "runs.yaml").read_text())
RUNS: list[dict[str, Any]] = TABLE["runs"]
FORWARD: dict[str, dict[str, Any]] = TABLE["forward"]
FITTED = [run for run in RUNS if not TABLE["sources"][run["source"]].get("held_out")]
HELD_OUT = [run for run in RUNS if run not in FITTED]
COUNTED = HERE / "operations.json"  # made by `python -m tests.benchmarks.plan_published --count`


class Denoiser:
    """Defines a diffusion model with its own loss as a recipe that the plan can count."""

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
    """Counts a model of the table: its parameters, its FLOPs per sample by the plan, and its operations."""
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


@cache
def _job() -> Job:
    return job(**{"workers.gpus": 1, "train.precision": "bf16"})


def table() -> dict[str, Any]:
    """Returns the plan's price table, with the speed of other attention kernels than torch's newest."""
    return {**hardware.table(), "kernels": TABLE["kernels"]}


def machine(run: dict[str, Any], prices: dict[str, Any]) -> hardware.Device:
    """Returns the device of a run: the table's, with the memory, network, and attention kernel that the run's source names."""
    said = dict(TABLE["machines"].get(run["device"], {"device": run["device"]}))
    name = said.pop("device")
    prices = {**prices, "devices": {**prices["devices"], name: {**prices["devices"][name], **said}}}
    device = hardware.resolve(_job(), prices, name)
    kernel = prices["kernels"].get(f"{source(run).get('attention')} {name}", 1.0)
    return replace(device, efficiency=replace(device.efficiency, attention=device.efficiency.attention * kernel))


def source(run: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = TABLE["sources"][run["source"]]
    return found


def planned(run: dict[str, Any], prices: dict[str, Any]) -> float:
    """Returns the plan's tokens or images per second and device for a run.

    If workers shard matrices or samples, each worker has its part of all operations.
    """
    numel, work = counted()[key(run)]
    model, said, length = TABLE["models"][run["model"]], source(run), run.get("length", 1)
    workers, accumulation, stage, micro = run["workers"], math.ceil(run["accumulation"]), run["stage"], run["micro_batch_size"]
    tensor, expert = run.get("tensor", 1), run.get("expert", 1)
    layers, width = (model.get(a, model.get(b, 0)) for a, b in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd")))
    setting = step_time.Setting(
        workers, stage, micro / tensor, accumulation, run["replayed"], run.get("compile", False), False, run.get("fp8", False)
    )
    device, network = machine(run, prices), hardware.network(prices)
    handing = 0.0
    if tensor > 1:
        sums, gathered = said.get("sums", 2), model["vocab_size"] / 2 if said.get("gathers_logits") else 0
        each = sums * width * layers * length
        whole = replace(setting, micro_batch_size=micro)
        calls = (2 * layers, 2 * layers)
        handing += step_time.adding((each + gathered * length, each), calls, tensor, 2, whole, device, network)[1]
    experts = 0
    if expert > 1:  # of these runs all workers divide them, so that no expert is gathered
        experts = layers * model["num_experts"] * 3 * width * model["moe_intermediate_size"]
        sent = 2 * length * model["num_experts_per_tok"] * width * layers * (expert - 1) // expert
        one = 2 * model["num_experts"] * width * model["moe_intermediate_size"]
        work = step_time.divided(work, (one, 2 * one), expert)  # down, and gate with up
        handing += step_time.exchanging(sent, expert, 2, replace(setting, micro_batch_size=micro / expert), device, network)[1]
    numel, alike = (numel - experts) // tensor, workers // tensor
    around = traffic.volume(numel, 2, alike, stage, accumulation)
    if stage == 3:  # gradients in another precision than the weights
        around += int(accumulation * numel * (said.get("summed", 2) - 2) * (alike - 1) / alike)
    calls = traffic.calls(stage, accumulation, layers + 1, -(-numel // memory.BUCKETS["reduce_bucket_size"]))
    moved = traffic.Traffic(around, workers, rings=min(tensor, device.per_node), calls=calls if alike > 1 else 0)
    updated = step_time.updating((numel + experts) / alike, 2, device)
    took = step_time.step(
        step_time.computing(work, setting, device), moved, updated, setting, device, network, exchanging=handing
    )
    return micro * accumulation * length / took.total / tensor


def error(run: dict[str, Any], prices: dict[str, Any]) -> float:
    """Returns the relative error of the planned time against the measured time; above 0 if the plan is too slow."""
    return run["measured"] / planned(run, prices) - 1
