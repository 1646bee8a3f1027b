"""Builds a small valid job as plain data, with changes by key path."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from heliostat import schema
from heliostat.config.spec import Job

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "name": "small",
    "recipe": "heliostat.recipes:CausalLM",
    "model": {"arch": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 64, "vocab_size": 96},
    "data": {"sources": [{"path": "data/a", "weight": 1.0}], "sequence_length": 64},
    "train": {"steps": 100, "global_batch_size": 8, "micro_batch_size": 2, "optimizer": {"lr": 1e-3}},
    "evaluate": {"every": 10, "fraction": 0.1},
    "checkpoint": {"every": 10},
    "storage": "runs",
    "mlflow": {"uri": "sqlite:///mlflow.db", "experiment": "small"},
}  # fmt: skip


def raw(**changes: Any) -> dict[str, Any]:
    """Returns BASE with `key.path: value` changes; None removes a key."""
    made = copy.deepcopy(BASE)
    for path, value in changes.items():
        *parents, last = path.split(".")
        target: Any = made
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target.setdefault(key, {})
        if value is None:
            target.pop(last)
        else:
            target[int(last) if isinstance(target, list) else last] = value
    return made


def job(**changes: Any) -> Job:
    return schema.validate(Job, raw(**changes), "job.yaml")


def write(folder: Path, **changes: Any) -> Path:
    """Writes the job to a file."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw(**changes)))
    return path
