"""Fills in missing keys of a job file whose values follow from other keys or from the machine. `heliostat check` shows each of
these defaults.

A job needs `name`, `model`, `data.path`, `data.sequence_length`, and `train.steps`. Defaults that are the same for every job are
in the modules that define the sections. Defaults that depend on other keys or on the machine are in this module.
docs/reference/yaml.md lists the sources of these rules.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from heliostat.config.fields import LARGEST

Raw = dict[str, Any]
RECIPES = {"backbone": "TextToImage", "pooling": "Embedder"}  # key of `model` that only one recipe has -> this recipe
LANGUAGE_MODEL = "heliostat.recipes:CausalLM"
PACKED = "heliostat.recipes:SFT"  # the recipe whose samples are conversations that must not see each other
WIDTHS, DEPTHS = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LENGTHS = ("steps", "epochs", "tokens")
GLOBAL_BATCH, MICRO_BATCH = 64, 4
STORE, RUNS = "sqlite:///.heliostat/mlflow.db", ".heliostat/runs"


class Default(NamedTuple):
    """Describes a key that was filled in: its value, and the rule for the value."""

    key: str
    value: object
    why: str


class Devices(NamedTuple):
    """Describes the devices of the workers. `gpus`: GPUs per worker, 1 or 0; `why`: the reason for this number."""

    gpus: int
    why: str


def here() -> Devices:
    """Looks for GPUs on this machine. Imports torch only if a GPU's device file exists."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        import torch

        if count := torch.cuda.device_count():
            return Devices(1, f"auto: this machine has {count} GPU{'s' if count > 1 else ''}")
    return Devices(0, "auto: this machine has no GPU")


def fill(raw: Raw, devices: Callable[[], Devices] = here) -> tuple[Raw, list[Default]]:
    """Returns a copy of a job with all defaults filled in, and the list of those defaults.

    Sections with values of a wrong type aren't changed; the schema reports them.
    """
    job = _Filling(raw)
    job.give("", "recipe", *_recipe(job.part("model")))
    if job.raw.get("recipe") == PACKED:
        job.give("data", "document_mask", True, "packed conversations don't see each other")
    _fill_workers(job, devices)
    _fill_batches(job)
    _fill_tokens(job)
    _fill_optimizer(job)
    if not job.waits:
        every = max(1, min(1000, job.number("train.steps") // 10))
        job.give("checkpoint", "every", every, "a tenth of train.steps, at most 1,000")
    job.give("", "storage", RUNS, "in the workspace")
    store = os.environ.get("MLFLOW_TRACKING_URI")
    job.give("mlflow", "uri", store or STORE, "MLFLOW_TRACKING_URI" if store else "the store that commands use")
    name = job.raw.get("name")
    job.give("mlflow", "experiment", name if isinstance(name, str) else "unnamed", "the job's name")
    return job.raw, job.filled


class _Filling:
    """Fills in missing keys of a job, and lists them in `filled`."""

    def __init__(self, raw: Raw) -> None:
        self.raw: Raw = {key: dict(part) if isinstance(part, dict) else part for key, part in raw.items()}
        self.filled: list[Default] = []

    def part(self, section: str) -> Raw:
        """Returns a section. If the section is missing or isn't a mapping, returns an empty section."""
        part = self.raw.get(section)
        return part if isinstance(part, dict) else {}

    def number(self, path: str) -> int:
        """Returns the positive integer at `section.key`; 0 for any other value."""
        section, _, key = path.partition(".")
        value = self.part(section).get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST else 0

    @property
    def waits(self) -> bool:
        """Returns whether the number of steps follows from epochs. Such a number is known only after heliostat has read the
        dataset."""
        return "epochs" in self.part("train") and not self.number("train.steps")

    def give(self, section: str, key: str, value: object, why: str) -> None:
        """Sets a missing key, unless its section isn't a mapping."""
        part = self.raw.setdefault(section, {}) if section else self.raw
        if isinstance(part, dict) and key not in part:
            part[key] = value
            self.filled.append(Default(f"{section}.{key}".lstrip("."), value, why))


def _recipe(model: Raw) -> tuple[str, str]:
    for key, name in RECIPES.items():
        if key in model:
            return f"heliostat.recipes:{name}", f"model has {key}"
    return LANGUAGE_MODEL, "a language model"


def _fill_workers(job: _Filling, devices: Callable[[], Devices]) -> None:
    workers = job.raw.get("workers", {})
    if isinstance(workers, dict) and workers.get("gpus", "auto") == "auto":
        workers.pop("gpus", None)
        job.give("workers", "gpus", *devices())


def _replicas(job: _Filling) -> int:
    """Returns the number of replicas; 1 if the file has invalid values."""
    count = job.part("workers").get("count", 1)
    most = count[-1] if isinstance(count, list) and count else count
    parallel = job.part("train").get("parallel")
    degrees = [parallel.get(key, 1) for key in ("sequence", "tensor")] if isinstance(parallel, dict) else []
    if not all(isinstance(number, int) and 0 < number <= LARGEST for number in (most, *degrees)):
        return 1
    return max(1, most // math.prod(degrees))


def _fill_batches(job: _Filling) -> None:
    replicas, micro = _replicas(job), job.number("train.micro_batch_size")
    if "train" not in job.raw:
        return
    unit = replicas * (micro or 1)
    whole = -(-GLOBAL_BATCH // unit) * unit
    why = (
        "samples per optimizer step"
        if whole == GLOBAL_BATCH
        else "the next multiple of the samples that the workers process at once"
    )
    job.give(
        "train", "global_batch_size", whole, f"{GLOBAL_BATCH} {why}" if whole == GLOBAL_BATCH else f"{GLOBAL_BATCH}, or {why}"
    )
    each = job.number("train.global_batch_size") // replicas
    if each:
        job.give(
            "train",
            "micro_batch_size",
            math.gcd(MICRO_BATCH, each),
            f"samples that a worker processes at once, at most {MICRO_BATCH}",
        )


def _fill_tokens(job: _Filling) -> None:
    """Replaces `train.tokens` by the number of steps."""
    train, tokens = job.part("train"), job.number("train.tokens")
    batch, length = job.number("train.global_batch_size"), job.number("data.sequence_length")
    if tokens and batch and length and not {"steps", "epochs"} & train.keys():
        set_steps(train, -(-tokens // (batch * length)), f"tokens: {tokens}")
        job.filled.append(Default("train.steps", train["steps"], f"{tokens:,} tokens / ({batch} samples x {length} tokens)"))


def set_steps(train: Raw, steps: int, origin: str) -> None:
    """Sets the number of steps that follows from epochs or tokens, and its origin."""
    for key in LENGTHS:
        train.pop(key, None)
    train |= {"steps": steps, "steps_from": origin}


def _fill_optimizer(job: _Filling) -> None:
    """Fills in AdamW's learning rate, and a cosine schedule after a warm-up, like LLaMA (Touvron et al. 2023, arXiv 2302.13971).

    If a job sets its learning rate, this function doesn't change the job's schedule.
    """
    train = job.part("train")
    optimizer = train.get("optimizer", {})
    if (
        not train
        or job.waits
        or not isinstance(optimizer, dict)
        or optimizer.get("name", "adamw") != "adamw"
        or "lr" in optimizer
    ):
        return
    rate, why = _rate(job)
    train["optimizer"] = {"name": "adamw", **optimizer, "lr": rate}
    job.filled.append(Default("train.optimizer.lr", rate, f"AdamW; {why}"))
    steps, schedule = job.number("train.steps"), train.get("schedule", {})
    if steps and isinstance(schedule, dict) and "warmup_steps" not in schedule:
        warmup = min(2000, steps // 10)
        train["schedule"] = {"name": "cosine", **schedule, "warmup_steps": warmup}
        name = train["schedule"]["name"]
        job.filled.append(Default("train.schedule", train["schedule"], f"{name}; warm-up is a tenth of the steps, at most 2,000"))


def _rate(job: _Filling) -> tuple[float, str]:
    """Returns a peak learning rate, and its source."""
    model = job.part("model")
    if "pretrained" in model:
        return 2e-5, "fine-tuning: the rate of Llama 2 (arXiv 2307.09288)"
    if job.raw.get("recipe") != LANGUAGE_MODEL:
        return 1e-4, "the rate of DiT and Stable Diffusion (arXiv 2212.09748)"
    width, depth = (next((model[key] for key in keys if isinstance(model.get(key), int)), 0) for keys in (WIDTHS, DEPTHS))
    if not (0 < width <= LARGEST and 0 < depth <= LARGEST):
        return 3e-4, "the rate of LLaMA (arXiv 2302.13971)"
    size = 12 * depth * width**2
    rate = max(1e-4, 0.003239 - 0.0001395 * math.log(size))
    return float(f"{rate:.2g}"), f"by size, {size:,} weights in the layers (arXiv 2001.08361, D.1)"
