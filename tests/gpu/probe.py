"""Finds the features of this machine that parts may need, and the versions of its libraries."""

from __future__ import annotations

import importlib.metadata
import platform
from importlib.util import find_spec
from typing import Any

VERSIONS = ("torch", "deepspeed", "transformers", "heliostat", "flash-attn")
LIBRARIES = ("pyarrow", "flash_attn", "ray", "mlflow", "diffusers")


def probe(missing: list[str]) -> dict[str, Any]:
    """Describes the machine. `has`: the features that parts may need, without replaced libraries."""
    import torch

    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else (0, 0)
    gpus = torch.cuda.device_count() if gpu else 0
    has = [
        "gpu" if gpu else "cpu",
        *(f"{n} gpus" for n in range(2, gpus + 1)),
        *(name for name in LIBRARIES if name not in missing and find_spec(name)),
    ]
    return {
        "device": torch.cuda.get_device_name() if gpu else f"no GPU ({platform.machine()})",
        "gpus": gpus,
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / (1 << 30) if gpu else None,
        "capability": list(capability),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
        "has": [*has, "float8"] if capability >= (8, 9) else has,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
