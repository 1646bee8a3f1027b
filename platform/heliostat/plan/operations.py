"""Counts the operations of a training step by kind of work: their FLOPs, and the bytes that they read and write.

The recipe's own loss runs forward and backward on fake tensors, and every operation that torch dispatches is recorded. The loss
runs on two samples and on three samples. The difference is the work of one sample. The rest is work that occurs once per
micro-batch, such as reading the weights and writing their gradients. So heliostat needs no formula per architecture. Attention
without a fused kernel counts as matrix multiplications and memory traffic; a fused kernel counts as attention. A frozen model has
no backward pass.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heliostat.plan.counts import ALWAYS, AT_STAGE_3, ATTENTION, CONVOLUTION, MATMUL, MEMORY, OperationWork
from heliostat.recipes.text import selective

Arguments = Sequence[Any]  # arguments of an operation: tensors, numbers, and lists of tensors or numbers
FREE = {"detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view",
        "_local_scalar_dense"}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """Describes one operation that ran: its kind, its FLOPs, and the bytes that it read and wrote. `replayed`, `dear`: see
    `OperationWork`."""

    kind: str
    flops: float
    moved: float
    replayed: int
    dear: bool


class OperationRecorder(TorchDispatchMode):
    """Records every operation that torch dispatches inside its context.

    The recomputation of a layer ends when autograd has all kept tensors of this layer. torch's own matrix multiplications save
    their inputs before they compute. At stage 3, DeepSpeed's linear layers save their inputs afterwards. So if a layer ends with
    such a matrix multiplication, this multiplication is recomputed too.
    """

    def __init__(self, layers: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.found: list[Operation] = []
        self._layers, self._begun, self._last = list(layers), list[int](), 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda t: t)

    def __enter__(self) -> OperationRecorder:
        self._handles = [
            h for m in self._layers for h in (m.register_forward_pre_hook(self._begin), m.register_forward_hook(self._end))
        ]
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: object) -> None:
        self._begun.append(len(self.found))
        self._last = len(self.found)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._last = len(self.found)
        return tensor

    def _end(self, *_: object) -> None:
        for i in range(self._begun.pop(), self._last):
            self.found[i] = replace(self.found[i], replayed=ALWAYS)
        if self._last < len(self.found) and self.found[self._last].dear:
            self.found[self._last] = replace(self.found[self._last], replayed=AT_STAGE_3)

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: Arguments = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space != "prim" and not func.is_view and name not in FREE:
            self.found.append(describe(name, args, kwargs or {}, out, selective.is_kept(func, args, kwargs)))
        return out


def describe(name: str, args: Arguments, kwargs: Mapping[str, object], out: object, dear: bool) -> Operation:
    """Describes an operation from the operation's name and tensors. The result's `replayed` is 0 (not recomputed)."""
    tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
    moved = float(sum(t.numel() * t.element_size() for t in tensors.values()))
    kind, flops = _work(name, args, kwargs, out)
    return Operation(kind, float(flops), moved, 0, dear)


def _work(name: str, args: Arguments, kwargs: Mapping[str, object], out: Any) -> tuple[str, float]:
    """Returns an operation's kind and its FLOPs. Operations that only move memory have 0 FLOPs."""
    if "scaled_dot_product" in name or name in ("_flash_attention_forward", "_flash_attention_backward"):
        return ATTENTION, _attention(name, args, kwargs)
    if name in ("mm", "bmm"):
        return MATMUL, 2 * math.prod(args[0].shape) * args[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return MATMUL, 2 * math.prod(args[1].shape) * args[2].shape[-1]
    if name == "_grouped_mm":  # multiplies each row of the first argument with one expert's matrix; its gradient is 3-D
        return MATMUL, 2 * math.prod(args[0].shape) * args[1].shape[-1]
    if name in ("convolution", "_convolution"):
        return CONVOLUTION, 2 * math.prod(out.shape) * math.prod(args[1].shape[1:])
    if name == "convolution_backward":
        each = 2 * math.prod(args[0].shape) * math.prod(args[2].shape[1:])
        return CONVOLUTION, each * sum(args[10][:2])
    return MEMORY, 0


def _attention(name: str, args: Arguments, kwargs: Mapping[str, object]) -> float:
    """Counts the FLOPs of a fused attention: two matrix multiplications forward and five backward. Causal attention needs half
    of the FLOPs."""
    backward = "backward" in name
    query, key, value = args[1:4] if backward else args[:3]
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    products = 2 * query.shape[-1] * (3 if backward else 1) + 2 * value.shape[-1] * (2 if backward else 1)
    causal = kwargs.get("is_causal", any(a is True for a in args))
    return pairs * products * (0.5 if causal else 1.0)


def grouped(two: Sequence[Operation], three: Sequence[Operation]) -> tuple[OperationWork, ...]:
    """Groups the equal operations of a step on two samples and a step on three samples, with the work that each sample adds.

    Batches of one sample aren't used, because some tensors are contiguous only in a batch of one sample, and then need no copy.
    If the two runs have different operations, all work of the run on two samples counts as proportional to the number of samples.
    """
    if [o.kind for o in two] != [o.kind for o in three]:
        three = [replace(o, flops=1.5 * o.flops, moved=1.5 * o.moved) for o in two]
    each = (
        OperationWork(a.kind, 1, b.flops - a.flops, b.moved - a.moved, max(0.0, 3 * a.moved - 2 * b.moved), a.replayed, a.dear)
        for a, b in zip(two, three, strict=True)
    )
    return tuple(replace(one, count=n) for one, n in Counter(each).items())


def counted(work: Iterable[OperationWork]) -> Counter[OperationWork]:
    """Counts equal operations together. Returns a Counter with the number of each operation."""
    counts = Counter[OperationWork]()
    for w in work:
        counts[replace(w, count=1)] += w.count
    return counts


def extended(base: Sequence[OperationWork], longer: Sequence[tuple[Sequence[OperationWork], int]]) -> tuple[OperationWork, ...]:
    """Adds the work of more layers to a model's work. `longer`: for each kind of layer, the work of the model with one more layer
    of this kind, and the number of layers of this kind to add."""
    counts, once = counted(base), counted(base)
    for work, more in longer:
        added = counted(work)
        added.subtract(once)
        for one, n in added.items():
            counts[one] += more * n
    return tuple(replace(one, count=n) for one, n in counts.items() if n)
