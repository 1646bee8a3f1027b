"""Lists the pieces of `python -m tests.gpu`, the most telling first: each runs in a process of its own, up to its deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Piece:
    """Describes a piece: where its function is, with what it is called, what it needs, and the seconds that it may take."""

    name: str
    function: str
    given: dict[str, Any]
    needs: tuple[str, ...] = ("gpu",)  # of what `probe` finds
    deadline_s: float = 90.0

    def call(self) -> Iterator[dict[str, Any]]:
        module, _, name = self.function.partition(":")
        found: Callable[..., Iterator[dict[str, Any]]] = getattr(import_module(f"tests.gpu.{module}"), name)
        return partial(found, **self.given)()


def _right(name: str, *needs: str, deadline_s: float = 90.0, **given: Any) -> Piece:
    function = name.partition(" ")[0]
    return Piece(name, f"correctness:{function}", given, needs, deadline_s)


def _fast(*needs: str, **given: Any) -> Piece:
    name = " ".join(["train", *(f"{k}={v}" for k, v in given.items())])
    return Piece(name, "speed:train", given, ("gpu", *needs), 120.0)


PIECES = [
    _right("zero fp32", precision="fp32"),
    _right("zero bf16", precision="bf16"),
    _right("save", "pyarrow"),
    _right("attention", "gpu"),
    _right("ahead"),
    _right("draws", "pyarrow"),
    _right("offload"),
    _right("optimizers", deadline_s=150),
    _right("zero fp16", "gpu", precision="fp16"),
    _right("flex", "gpu", deadline_s=120),
    _right("compiled", "gpu", deadline_s=150),
    _right("fp8", "gpu", "float8"),
    _right("linear8"),
    _right("attending flex_attention", "gpu", deadline_s=150, kernel="flex_attention"),
    _right("attending flash_attention_2", "gpu", "flash_attn", kernel="flash_attention_2"),
    _right("attending eager", kernel="eager"),
    Piece("train on a CPU", "speed:train", {"model": "tiny", "length": 64, "micro": 2, "seconds": 1.0}, ("cpu",)),
    _fast(model="1B"),
    _fast(model="1B", compile=True),
    _fast(model="1B", compile="blocks"),
    _fast("float8", model="1B", compile="blocks", fp8=True),
    Piece("checkpoint model=1B", "speed:checkpoint", {"model": "1B"}, ("gpu", "pyarrow"), 120.0),
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
]
