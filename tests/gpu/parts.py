"""Lists the parts of `python -m tests.gpu`, the most informative first. Each part runs in a separate process with a deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Part:
    """Describes a part: its function, the arguments, its requirements in `probe`, and its deadline in seconds.

    `small`: other arguments for a run without a GPU; None if such a run makes no sense.
    """

    name: str
    function: str
    given: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ("gpu",)
    deadline_s: float = 90.0
    small: dict[str, Any] | None = None

    def resolve(self) -> Callable[..., Iterator[dict[str, Any]]]:
        """Imports the part's function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Iterator[dict[str, Any]]] = getattr(import_module(f"tests.gpu.{module}"), name)
        return function

    def call(self, small: bool = False) -> Iterator[dict[str, Any]]:
        """Calls the part's function, which yields rows. `small`: as for a run without a GPU."""
        return self.resolve()(**self.given | ((self.small or {}) if small else {}))


def _right(
    name: str, *needs: str, module: str = "correctness", small: bool = True, deadline_s: float = 120.0, **given: Any
) -> Part:
    function = name.partition(" ")[0].replace("-", "_")
    return Part(name, f"{module}:{function}", given, ("gpu", *needs), deadline_s, {} if small else None)


def _run(name: str, *needs: str, deadline_s: float = 240.0, small: bool = True, **given: Any) -> Part:
    """Describes a part that trains on Ray."""
    return _right(name, *needs, "ray", "mlflow", "pyarrow", module="runs", small=small, deadline_s=deadline_s, **given)


TINY = {"model": "tiny", "length": 64, "micro": 2, "seconds": 0.2}


def _fast(*needs: str, goal: float | None = None, **given: Any) -> Part:
    name = " ".join(["train", *(f"{k}={v}" for k, v in given.items())])
    small = None if {"compile", "attention", "fp8"} & given.keys() or given.get("precision") == "fp16" else TINY
    return Part(name, "speed:train", given | ({"goal": goal} if goal else {}), ("gpu", *needs), 120.0, small)


PARTS = [
    _right("save", "pyarrow"),
    _right("sync", "pyarrow", "diffusers", module="steady"),
    _right("zero bf16", precision="bf16"),
    _right("offload"),
    _right("ema", module="steady"),
    _right("muon"),
    _right("replay", module="steady"),
    _right("attempts", module="steady", deadline_s=180),
    _fast(model="1B", compile="blocks", goal=0.5),
    Part("memory", "speed:memory", {}, ("gpu",), 180.0, {"small": True}),
    Part("activation-offload", "speed:activation_offload", {}, ("gpu",), 120.0, {"small": True}),
    _right("recipes", "pyarrow", "diffusers", module="steady", deadline_s=180),
    _run("profile"),
    _run("kill-worker", "2 gpus", deadline_s=300),
    _run("elastic", "2 gpus", deadline_s=300),
    _right("zero fp32", precision="fp32"),
    _right("zero fp16", small=False, precision="fp16"),
    _right("attention", small=False),
    _right("ahead"),
    _right("draws", "pyarrow"),
    _right("optimizers", deadline_s=150),
    _right("flex", small=False, deadline_s=120),
    _right("compiled", small=False, deadline_s=150),
    _right("fp8", "float8", small=False),
    _right("linear8", "float8"),
    _right("attending flex_attention", small=False, deadline_s=150, kernel="flex_attention"),
    _right("attending flash_attention_2", "flash_attn", small=False, kernel="flash_attention_2"),
    _right("attending eager", kernel="eager"),
    _fast(model="1B"),
    _fast(model="1B", compile=True),
    _fast("float8", model="1B", compile="blocks", fp8=True),
    Part("checkpoint model=1B", "speed:checkpoint", {"model": "1B"}, ("gpu", "pyarrow"), 120.0, {"model": "tiny"}),
    _fast(model="2.7B", stage=1, micro=2, checkpointing=True),
    _fast(model="2.7B", stage=3, micro=2, checkpointing=True),
    _fast(model="0.4B", micro=8),
    _fast(model="1B", stage=2),
    _fast(model="1B", stage=3),
    _fast(model="1B, 8 experts"),
    _fast(model="1B", optimizer="muon"),
    _fast("flash_attn", model="1B", attention="flash_attention_2"),
    _fast(model="1B", attention="flex_attention"),
    _fast(model="1B", attention="eager", micro=2),
    _fast(model="1B", precision="fp16"),
    _fast(model="0.4B", precision="fp32", micro=4),
    _run("pytest text", small=False, deadline_s=580, file="test_gpu_training.py"),
    _run("pytest images", "diffusers", small=False, deadline_s=580, file="test_gpu_diffusion.py"),
]
