"""Reads from transformers how to shard an architecture's matrices over workers (tensor parallelism). Tests this sharding.

The test needs one process. Small models of the architecture, each with its part of every matrix, compute one sample in parallel
threads. The threads add up the outputs of row-parallel matrices. Each model's logits must match those of the complete model.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from heliostat.data import device_threads
from heliostat.errors import ConfigError
from heliostat.parallel import tiny
from heliostat.parallel.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KEY = "train.parallel.tensor"
PARTS = 2
WAIT_S = 60.0
TOLERANCE = 1e-3  # in standard deviations of the logits; faults are larger, and rounding in fp64 is about 1e-9
Kind = Literal["column", "row", "summed"]
Shapes = list[tuple[int, ...]]  # shapes of the tensors that enter a module in one call
KINDS: dict[str, Kind] = {"colwise": "column", "rowwise": "row", "replicated_with_grad_allreduce": "summed"}
WHOLE = ("embedding_rowwise",)  # styles that transformers shards, but heliostat replicates
FIELDS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

_known: dict[str, str] = {}  # faults of the models that this process has tested


def of(model: PreTrainedModel) -> dict[str, Kind]:
    """Maps the name of each module to the way of sharding its weight.

    Leaves out the modules that every worker has completely. Returns an empty result if transformers shards a weight in a way that
    heliostat doesn't support.
    """
    base, plan = model.base_model_prefix, dict(_plan(model.config))
    if not KINDS.keys() >= set(plan.values()):
        return {}
    ways = [(re.compile(re.escape(f"{base}.{name}").replace(r"\*", r"\d+")), KINDS[style]) for name, style in plan.items()]
    return {name: kind for name, _ in model.named_modules() for pattern, kind in ways if pattern.fullmatch(name)}


def _plan(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    for name, style in (getattr(config, "base_model_tp_plan", None) or {}).items():
        if style not in WHOLE:
            yield name.removesuffix(".weight"), style


def require(recipe: LanguageModel, parts: int) -> None:
    """Raises ConfigError unless the matrices of the recipe's model can be sharded into `parts` parts."""
    config, kind = recipe.config, recipe.config.model_type
    plan = dict(_plan(config))
    if not plan:
        raise ConfigError(f"{KEY}: transformers has no tensor-parallel plan for {kind!r}. Set this key to 1")
    if recipe.routes:
        raise ConfigError(f"{KEY}: not supported for the experts of {kind!r}. Use train.parallel.expert")
    for name, style in plan.items():
        if style not in KINDS:
            raise ConfigError(f"{KEY}: not supported: transformers shards {name!r} of {kind!r} by {style!r}. Set this key to 1")
    for field in FIELDS:
        number = getattr(config, field, None)
        if isinstance(number, int) and number % parts:
            fits = [n for n in range(2, number + 1) if all(_number(config, f) % n == 0 for f in FIELDS)]
            instead = f"Use {' or '.join(map(str, fits[:4]))}" if fits else "Set this key to 1"
            raise ConfigError(f"{KEY}: {parts} doesn't divide model.{field} {number}. {instead}")
    if fault := tiny.remembered(_known, recipe, [recipe.document_mask], lambda: tiny.tried(recipe, _fault, 2 * PARTS)):
        raise ConfigError(f"{KEY}: not supported for {kind!r}: {fault}. Set this key to 1")


def _number(config: PreTrainedConfig, field: str) -> int:
    number = getattr(config, field, None)
    return number if isinstance(number, int) else 0


def _fault(small: LanguageModel) -> str:
    off, narrowed = played(small)
    if narrowed:
        return f"every worker would have all of {narrowed[0]!r}, but only a part of this module's input"
    return "" if off <= TOLERANCE else f"the shards' logits differ from the complete model's logits by {off:.1%}"


def played(recipe: LanguageModel) -> tuple[float, list[str]]:
    """Computes the largest difference between the logits of a small model's parts and of the complete model, in standard
    deviations of the logits.

    Also lists the modules that are complete on every worker, but get only a part of the input. For these modules, the workers
    would compute different gradients.
    """
    torch.manual_seed(0)
    model = recipe.build().eval().double()  # random weights saturate the softmax, which amplifies fp32 rounding to 1e-3
    tiny.stir(model)
    batch = {k: v for k, v in recipe.batch(tiny.tokens(recipe)).items() if k != "labels"}
    meeting = _Meeting()
    parts = [meeting.part(copy.deepcopy(model), number) for number in range(PARTS)]
    listed = of(model)
    seen, seen_by_part = _inputs(model, listed), _inputs(parts[0], listed)
    with torch.no_grad():
        whole = model(**batch).logits
    results: list[torch.Tensor | Exception | None] = [None] * PARTS

    def compute(number: int) -> None:
        try:
            with torch.no_grad():
                results[number] = parts[number](**batch).logits
        except Exception as e:  # noqa: BLE001  raised below, in the calling thread
            results[number] = e
            meeting.barrier.abort()

    threads = [device_threads.thread(partial(compute, number), f"part-{number}") for number in range(PARTS)]
    for thread in threads:
        thread.join()
    for one in sorted(
        results, key=lambda f: isinstance(f, threading.BrokenBarrierError)
    ):  # the cause first, then broken barriers
        if isinstance(one, Exception):
            raise one
    off = max(float((one - whole).abs().max() / whole.std()) for one in results if isinstance(one, torch.Tensor))
    return off, [name for name, shapes in seen.items() if seen_by_part[name] != shapes]


def _inputs(model: PreTrainedModel, listed: dict[str, Kind]) -> dict[str, list[Shapes]]:
    """Records the input shapes of later calls of each module that has parameters and isn't in `listed`."""
    seen = dict[str, list[Shapes]]()

    def note(name: str, args: tuple[object, ...], named: dict[str, object]) -> None:
        seen[name].append([tuple(value.shape) for value in (*args, *named.values()) if isinstance(value, torch.Tensor)])

    for name, module in model.named_modules():
        if name not in listed and next(module.parameters(recurse=False), None) is not None:
            seen[name] = []
            module.register_forward_pre_hook(lambda _, args, named, name=name: note(name, args, named), with_kwargs=True)
    return seen


class _Meeting:
    """Sums the partial outputs of a model's parts, which run in separate threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(PARTS, timeout=WAIT_S)
        self.held = dict[int, torch.Tensor]()

    def part(self, model: PreTrainedModel, number: int) -> PreTrainedModel:
        """Cuts a model's matrices down to part `number`, and adds up the outputs of row-parallel modules over all parts."""
        for name, kind in of(model).items():
            module = model.get_submodule(name)
            if kind == "summed":
                continue
            weight = module.get_parameter("weight").data.chunk(PARTS, 0 if kind == "column" else 1)[number]
            module.weight = torch.nn.Parameter(weight.clone())
            bias = getattr(module, "bias", None)
            if bias is not None and kind == "column":
                module.bias = torch.nn.Parameter(bias.data.chunk(PARTS)[number].clone())
            elif bias is not None and number:
                bias.data.zero_()  # the sum includes the bias once
            if kind == "row":
                module.register_forward_hook(lambda _, __, output: self._sum(number, output))
        return model

    def _sum(self, number: int, output: torch.Tensor) -> torch.Tensor:
        self.held[number] = output
        self.barrier.wait()
        total = torch.stack([self.held[part] for part in range(PARTS)]).sum(0)
        self.barrier.wait()
        return total
