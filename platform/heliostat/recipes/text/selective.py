"""Keeps the expensive outputs of a checkpointed layer, for `train.activation_checkpointing: selective`; recomputes the rest.

Matrix multiplications with weights, and fused attention, are expensive. These operations take nearly all of the computing time.
But their outputs are small enough to keep: the outputs' size grows only linearly with the number of tokens. Norms, activations,
residuals, rotations, and unfused attention are recomputed. The scores of unfused attention grow with the square of the number of
tokens.

The forward pass records the outputs, in the order of the operations. When autograd recomputes the layer, it runs the same
operations, and gets the recorded outputs instead. torch's contexts (`create_selective_checkpoint_contexts`) reject an output that
the layer later changes in place. DeepSpeed's linear layers with bias change their output in place at stage 3. This module copies
an output before such a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Operation: TypeAlias = torch._ops.OpOverload | torch._ops.HigherOrderOperator

PRODUCTS = {"mm", "addmm", "_linear_pointwise", "_grouped_mm", "_scaled_mm"}
ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
PRODUCT, ATTENDS = "product", "attention"

_passing = ContextVar("passing", default=False)


def is_dear(operation: Operation, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None) -> bool:
    """Checks whether an operation is expensive. Random operations don't count as expensive, because skipping one would change the
    random numbers of later operations."""
    if not (kind := _kind(operation)) or kind == PRODUCT:
        return bool(kind)
    assert isinstance(operation, torch._ops.OpOverload)  # all operations with a kind are
    arguments = {a.name: value for a, value in zip(operation._schema.arguments, args, strict=False)} | dict(kwargs or {})
    return not arguments.get("dropout_p")


@cache
def _kind(operation: Operation) -> str:
    schema = getattr(operation, "_schema", None)  # higher-order operators have no schema
    space, _, name = schema.name.partition("::") if schema else ("", "", "")
    if name in PRODUCTS:
        return PRODUCT
    fused = name.startswith(ATTENTION) or space.startswith("flash_attn")
    return ATTENDS if fused and "backward" not in name and "bwd" not in name else ""


def is_kept(operation: Operation, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None) -> bool:
    """Returns whether an operation's outputs are kept for the backward pass: if the operation is expensive, and runs outside the
    context `passing`."""
    return not _passing.get() and is_dear(operation, args, kwargs)


@contextmanager
def passing() -> Iterator[None]:
    """Opens a context in which selective checkpointing keeps no outputs, and recomputes all operations."""
    token = _passing.set(True)
    try:
        yield
    finally:
        _passing.reset(token)


def contexts() -> tuple[Keeping, Giving]:
    """Makes the contexts of a layer's forward pass and of its recomputation, in the form of `torch.utils.checkpoint`."""
    keeping = Keeping()
    return keeping, Giving(keeping.kept)


@dataclass(frozen=True)
class KeptOutputs:
    """Contains the kept outputs of an operation, or None if the operation is recomputed. `versions`: the number of in-place
    changes of each output before the output was kept."""

    operation: Operation | None
    out: object
    versions: tuple[int, ...]

    @classmethod
    def of(cls, operation: Operation | None, out: object) -> KeptOutputs:
        return cls(operation, out, tuple(t._version for t in _tensors(out)))

    @property
    def is_other(self) -> bool:
        """Returns whether an output was changed in place after the forward pass kept this output, so the kept values are lost."""
        return self.versions != tuple(t._version for t in _tensors(self.out))


NOTHING = KeptOutputs(None, None, ())


class Keeping(TorchDispatchMode):
    """Records the outputs of expensive operations. Records None for an operation whose outputs aren't kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[KeptOutputs] = []
        self._where: dict[int, int] = {}  # storage -> place in `kept`

    @property
    def bytes(self) -> int:
        """Counts the bytes kept so far, before any output is used."""
        return sum({_storage(t): t.untyped_storage().nbytes() for kept in self.kept for t in _tensors(kept.out)}.values())

    def __torch_dispatch__(
        self, func: Operation, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        for storage in written(func, args, kwargs or {}):
            if (place := self._where.pop(storage, None)) is not None:
                self.kept[place] = KeptOutputs.of(self.kept[place].operation, tree_map(_copied, self.kept[place].out))
        out = func(*args, **(kwargs or {}))
        if is_dear(func, args, kwargs):
            kept = tree_map(_detached, out) if is_kept(func, args, kwargs) else None
            self._where |= {_storage(t): len(self.kept) for t in _tensors(kept)}
            self.kept.append(KeptOutputs.of(func, kept))
        return out


class Giving(TorchDispatchMode):
    """Returns the kept outputs instead of running expensive operations again. Each output is returned once."""

    def __init__(self, kept: list[KeptOutputs]) -> None:
        super().__init__()
        self.kept, self.place = kept, 0

    def __enter__(self) -> Giving:
        self.place = 0  # also for a second backward pass, which then finds no outputs
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Operation, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if not is_dear(func, args, kwargs):
            return func(*args, **(kwargs or {}))
        kept = self.kept[self.place] if self.place < len(self.kept) else NOTHING
        if kept.operation is not func:
            raise RuntimeError(f"a recomputed layer calls {func}, but the saved output is of {kept.operation}")
        if kept.is_other:
            raise RuntimeError(f"the saved output of {func} was changed in place after the layer's forward pass")
        self.kept[self.place] = NOTHING
        self.place += 1
        return func(*args, **(kwargs or {})) if kept.out is None else kept.out


def written(func: Operation, args: Sequence[object], kwargs: Mapping[str, object]) -> list[int]:
    """Lists the storages that an operation writes to."""
    if not (schema := getattr(func, "_schema", None)) or not schema.is_mutable:
        return []
    arguments = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(schema.arguments)]
    return [_storage(t) for a, value in arguments if a.alias_info and a.alias_info.is_write for t in _tensors(value)]


def _tensors(value: object) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _detached(value: object) -> object:
    """Detaches a tensor, such that in-place changes of the original still increase its version."""
    if not isinstance(value, torch.Tensor):
        return value
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # otherwise not, below autograd
        return value.detach()


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value
