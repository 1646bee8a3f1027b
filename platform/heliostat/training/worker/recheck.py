"""Detects silent data corruption: every `train.sdc_check.every` steps, all workers compute the same micro-batch and compare the
bits of the results.

The micro-batch is one of the step's micro-batches, chosen by the step number. Its samples, its random numbers, and the weights
follow from the step. So each worker reads the samples itself, and must compute the same bits. The check compares:

- the weights, if each worker has all of them (ZeRO 0 to 2)
- the loss
- the gradients of some parameters, chosen by the step number, up to ELEMENTS elements

Training waits for one extra micro-batch per check. Other steps have no extra cost. Gradients are computed outside the engine,
which never sees them.

If most workers have the same bits, these bits count as right. If no bits have a majority, the error lists all workers on that
kind of device. Only workers on the same kind of device are compared. Unlike training, the check requests deterministic kernels
(`kernels`). If bits differ, all workers compute again. A worker whose first and second result differ is at fault. If the two
results of most workers differ, their kernels aren't deterministic. Then the check proves nothing, and turns itself off.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from heliostat.checkpoint.agreement import agreed, together
from heliostat.data.dataset import Dataset
from heliostat.engine import process_group, sharded_state
from heliostat.errors import ConfigError, CorruptionError
from heliostat.parallel import division
from heliostat.recipes.protocol import Batch, Recipe
from heliostat.recipes.text.selective import ATTENTION
from heliostat.storage import wire
from heliostat.training.worker.context import Context, Hook
from heliostat.training.worker.micro_batches import BatchPlan

if TYPE_CHECKING:
    from heliostat.engine.deepspeed_engine import DeepSpeedEngine

ELEMENTS = 64_000_000  # gradient elements per check, because each worker holds them in full
FLASH = "FLASH_ATTENTION_DETERMINISTIC"  # transformers reads this variable at each call of flash-attn
BLOCK = 1 << 24  # elements that a digest processes at a time
SPREAD = -7046029254386353131  # 2^64 divided by the golden ratio, odd, as a signed number


@wire.travels
@dataclass(frozen=True)
class WorkerDigests:
    """Holds one worker's results: its node's id and address, its kind of device, and the digests in order."""

    node: str
    address: str
    kind: str
    digests: tuple[int, ...]


class CorruptionCheck(Hook):
    def __init__(
        self, context: Context, engine: DeepSpeedEngine, recipe: Recipe, dataset: Dataset, plan: BatchPlan, where: tuple[str, str]
    ) -> None:
        """Prepares the checks. `where`: the id and the address of this worker's node."""
        self.context, self.job, self.group = context, context.job, context.control
        self.engine, self.recipe, self.dataset, self.plan = engine, recipe, dataset, plan
        self.where, self.kind, job = where, _kind(engine.device), self.job
        assert job.train.sdc_check
        self.keys, self.off = job.train.sdc_check, False
        self.agreed = -1  # the number of steps done when all workers last agreed
        self.compiled = bool(job.train.compile) or job.train.attention == "flex_attention"
        self.whole = engine.zero_optimization_stage() < 3  # whether each worker holds all weights

    def looks(self, step: int) -> bool:
        return self.due(step)

    def before_step(self, step: int) -> None:
        """Compares the workers if a check is due. Raises CorruptionError on all workers if the results differ."""
        if self.due(step):
            self.context.posts.notice(self.look(step))
            self.context.progressed()

    def due(self, step: int) -> bool:
        """Returns whether a check is due before the step."""
        return not self.off and dist.get_world_size() > 1 and self.keys.due(step, first=self.agreed < 0)

    def look(self, step: int) -> str | None:
        """Compares the workers before a step. Returns a notice for the user if the check turns itself off.

        Raises CorruptionError on all workers if the results differ.
        """
        if self.agreed < 0:
            self.agreed = step
        batch, seed = agreed(self.group, lambda: self._micro(step))
        drawn = self._drawn(step)
        names = [*(self._weights() if self.whole else ()), "the loss", *(f"the gradient of {name}" for name, _ in drawn)]
        results = self._all(batch, seed, drawn)
        if not (odd := outvoted([(one.kind, one.digests) for one in results])):
            self.agreed = step
            return None
        again = self._all(batch, seed, drawn)
        unsteady = [rank for rank, (a, b) in enumerate(zip(results, again, strict=True)) if a.digests != b.digests]
        if 2 * len(unsteady) > len(results):
            self.off = True
            return (
                f"step {step + 1}: train.sdc_check is off from now on: this model's kernels aren't deterministic, "
                "so workers can't be compared"
            )
        odd = unsteady or odd
        raise CorruptionError(self._explain(step, results, odd, names), sorted({results[r].node for r in odd}), self.agreed)

    def _explain(self, step: int, results: Sequence[WorkerDigests], odd: Sequence[int], names: Sequence[str]) -> str:
        right = Counter(one.digests for one in results).most_common(1)[0][0]
        mine = [one for one in (results[r].digests for r in odd) if one != right] or [results[odd[-1]].digests]
        what = [name for i, name in enumerate(names) if any(one[i] != right[i] for one in mine)]
        who = ", ".join(f"worker {r} on {results[r].address} (node {results[r].node[:12]})" for r in odd)
        more = f" and {len(what) - 1} more" if len(what) > 1 else ""
        unsure = "" if len(odd) < len(results) else "; heliostat doesn't know which of them is right"
        return (
            f"step {step + 1}: silent data corruption: {who} computed different bits from the same samples and "
            f"weights: {what[0] if what else 'its own results differ'}{more}{unsure}. All workers agreed up to "
            f"step {self.agreed}"
        )

    # computation ---------------------------------------------------------------------------------------------------

    def _micro(self, step: int) -> tuple[Batch, int]:
        """Reads the micro-batch that is drawn for a step. Returns the micro-batch, and the seed of its random numbers."""
        micro, train = self.plan.micro, self.job.train
        number = int(np.random.SeedSequence([train.seed, step, 1]).generate_state(1)[0]) % (train.global_batch_size // micro)
        part = slice(number * micro, (number + 1) * micro)
        lanes = range(self.dataset.plan.shape.lanes)
        loaded = self.dataset.load(self.dataset.order.step(step).ravel()[part], self.job.data.on_bad_sample == "replace")
        batch = self.recipe.batch(loaded.content, self.plan.keys(step, lanes)[part])
        return {k: v.to(self.engine.device) for k, v in batch.items()}, self.plan.seed(step, lanes, number)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad]

    def _weights(self) -> list[str]:
        return [f"the weights of {name}" for name, _ in self.engine.module.named_parameters()]

    def _drawn(self, step: int) -> list[tuple[str, torch.nn.Parameter]]:
        """Draws the parameters whose gradients are compared: as many as fit into ELEMENTS, at least one, in the model's order."""
        trained = self._trained()
        order = np.random.default_rng([self.job.train.seed, step, 2]).permutation(len(trained))
        sizes = np.cumsum([division.numel(p) for _, p in (trained[i] for i in order)])
        return [trained[i] for i in sorted(order[: max(1, int((sizes <= ELEMENTS).sum()))])]

    def _all(self, batch: Batch, seed: int, drawn: list[tuple[str, torch.nn.Parameter]]) -> list[WorkerDigests]:
        """Computes the digests on every worker. All workers call this method together."""
        mine = WorkerDigests(*self.where, self.kind, tuple(self._digests(batch, seed, [p for _, p in drawn])))
        process_group.check()  # before the comparison: digests after an aborted collective are garbage
        return together(self.group, lambda: mine)

    def _digests(self, batch: Batch, seed: int, drawn: list[torch.nn.Parameter]) -> list[int]:
        module = self.engine.module
        weights = [digest(p.data) for p in module.parameters()] if self.whole else []
        buffers = [(b, b.clone()) for b in module.buffers()]
        torch.manual_seed(seed)
        try:
            with kernels(self.compiled):
                loss = self.recipe.loss(module, batch)
                objective = loss.sum
                for part in loss.parts.values():
                    objective = objective + part.weight * part.value.float()
                gradients = torch.autograd.grad(objective, drawn, allow_unused=True)
        except RuntimeError as e:
            if "heckpoint" not in str(e):
                raise
            raise ConfigError(
                f"train.sdc_check: not supported for activation checkpointing with use_reentrant=True ({e}). Set use_reentrant "
                f"to False"
            ) from e
        finally:
            self._rest(buffers)
        return [*weights, digest(loss.sum.detach()), *(0 if g is None else digest(g) for g in gradients)]

    def _rest(self, buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Restores the model's buffers to their values before the check, because only a step's own passes may change buffers."""
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if not self.whole:
            sharded_state.of(self.engine).release()


def outvoted(results: Sequence[tuple[str, tuple[int, ...]]]) -> list[int]:
    """Finds the ranks whose digests differ from those of most workers on their kind of device. Without a majority, returns all
    ranks of that kind."""
    odd = []
    for kind in {kind for kind, _ in results}:
        ranks = [rank for rank, one in enumerate(results) if one[0] == kind]
        right, votes = Counter(results[rank][1] for rank in ranks).most_common(1)[0]
        if votes < len(ranks):
            odd += ranks if 2 * votes <= len(ranks) else [rank for rank in ranks if results[rank][1] != right]
    return sorted(odd)


def digest(tensor: torch.Tensor) -> int:
    """Computes a digest of a tensor's bits, in 0 to 2^64 - 1: the sum of each element times an odd number that depends on its
    position.

    The order of the sum doesn't matter, and every single flipped bit changes the digest.
    """
    size = tensor.element_size()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    flat, total = tensor.detach().contiguous().view(-1).view(kind), 0
    for begin in range(0, flat.numel(), BLOCK):
        bits = flat[begin : begin + BLOCK].long()
        places = torch.arange(begin, begin + bits.numel(), device=bits.device)
        total += int((bits * ((places * SPREAD) | 1)).sum())
    return (total + flat.numel()) % (1 << 64)


def _kind(device: torch.device) -> str:
    """Describes the kind of device, which determines the kernels that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


# deterministic kernels ----------------------------------------------------------------------------------------------


@contextmanager
def kernels(compiled: bool) -> Iterator[None]:
    """Makes forward and backward passes inside the context deterministic, as far as deterministic kernels exist.

    `compiled`: whether the model, a part of it, or its attention is compiled.

    The request for torch's deterministic algorithms has `warn_only`. Otherwise an operation without a deterministic kernel would
    raise an error. Fused attention ignores a request with `warn_only`: its backward pass sums in any order. So the request is
    strict around each attention kernel; all of these have a deterministic form. Compiled models ignore such modes, so the request
    isn't strict for compiled models. flash-attn's own kernels read an environment variable.
    """
    uninitialized: Any = torch.utils.deterministic  # Any, because type checkers don't know this module's properties
    cudnn = torch.backends.cudnn
    before = (
        uninitialized.fill_uninitialized_memory,
        cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
        os.environ.get(FLASH),
    )
    with _algorithms(warn_only=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis.*")
        uninitialized.fill_uninitialized_memory = False  # filling costs time, and nothing reads that memory
        cudnn.benchmark = False  # workers could choose other convolutions
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention has no deterministic form
        os.environ[FLASH] = "1"
        try:
            with nullcontext() if compiled else _StrictAttention():
                yield
        finally:
            uninitialized.fill_uninitialized_memory, cudnn.benchmark = before[:2]
            torch.backends.cuda.enable_cudnn_sdp(before[2])
            os.environ.pop(FLASH)
            if before[3] is not None:
                os.environ[FLASH] = before[3]


@contextmanager
def _algorithms(warn_only: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class _StrictAttention(TorchDispatchMode):
    """Runs attention kernels and their backward passes with strict deterministic algorithms."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func._schema.name.partition("::")[2].startswith(ATTENTION):
            return func(*args, **(kwargs or {}))
        with _algorithms(warn_only=False):
            return func(*args, **(kwargs or {}))
