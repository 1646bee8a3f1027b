"""Counts a job's model without allocating its memory. Parameters are on torch's meta device, and activations are fake tensors.

Both counts run the recipe's own code: `build` makes the real modules, and `loss` runs the real forward pass on tensors with
shapes but no values. autograd reports the tensors that it keeps for the backward pass. So heliostat needs no formula per
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from heliostat.config.spec import Job
from heliostat.data.content import Content
from heliostat.plan.counts import Activations, Counts, ModelStats, OperationWork, Tile
from heliostat.plan.operations import OperationRecorder, extended, grouped
from heliostat.recipes import building, quantized
from heliostat.recipes.precision import dtype_of
from heliostat.recipes.protocol import Batch, DividesExperts, DividesMatrices, Recipe
from heliostat.recipes.text import checkpointing, next_token, selective, tiled_loss, tiled_mlp

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CHECKPOINTED = WeakKeyDictionary[torch.nn.Module, list[torch.nn.Module]]()  # of models of diffusers


def build(recipe: Recipe) -> torch.nn.Module:
    with torch.device("meta"):
        return building.build(recipe)


def count(job: Job, recipe: Recipe, built: torch.nn.Module | None, contents: Sequence[Content]) -> Counts:
    """Counts everything that a plan needs. `built`: the recipe's model from `build`, if it exists already. Don't use this model
    afterwards.

    `contents`: three inputs of `recipe.batch`: for one, two, and three samples.
    """
    built = built or build(recipe)
    model, parts = stats_of(recipe, built), job.train.parallel.tensor
    if parts > 1:
        _leave_part(built, model.own(parts))
    kept = activations(job, recipe, built, contents[0], count=not model.flops)
    model = replace(model, flops=model.flops or kept.flops * parts)
    return Counts(model, kept, work(job, recipe, built, (contents[1], contents[2])))


def stats_of(recipe: Recipe, model: torch.nn.Module) -> ModelStats:
    packed = quantized.layers_of(model).values()
    apart = {p: p.numel() for layer in packed for p in layer.parameters(recurse=False) if not p.is_floating_point()}
    named = {n: p for n, p in model.named_parameters() if p not in apart}
    weights, packed_bytes = sum(layer.in_features * layer.out_features for layer in packed), sum(apart.values())
    kept = model.state_dict().keys()
    trained = {n: tuple(p.shape) for n, p in named.items() if p.requires_grad}
    companions = recipe.companions().values()
    whole = building.gathered_whole(model)
    own = [sum(p.numel() for p in m.parameters(recurse=m in whole)) for m in model.modules()]
    return ModelStats(
        shapes={n: tuple(p.shape) for n, p in named.items()},
        frozen=frozenset(n for n, p in named.items() if not p.requires_grad),
        buffers={n: (tuple(b.shape), str(b.dtype).removeprefix("torch.")) for n, b in model.named_buffers() if n in kept},
        layer=max(own, default=0),
        active=recipe.active_parameters(model) or weights + sum(p.numel() for p in named.values()),
        packed=weights,
        stacked=_stacked(recipe, model),
        sent=recipe.sent(model) if isinstance(recipe, DividesExperts) else 0,
        flops=recipe.flops_per_sample(model) or 0.0,
        groups=[names for _, names in building.grouped(recipe, trained)],
        hidden=building.hidden_matrices(recipe, model),
        frozen_models=(
            packed_bytes + sum(c.bytes for c in companions if c.every_step),
            packed_bytes + sum(c.bytes for c in companions),
        ),
        divided=_divided(recipe, model),
    )


def _divided(recipe: Recipe, model: torch.nn.Module) -> dict[str, str]:
    """Maps the name of each parameter that workers could shard (`train.parallel.tensor`) to the way of sharding: `column` or
    `row`."""
    if not isinstance(recipe, DividesMatrices):
        return {}
    ways = {name: kind for name, kind in recipe.divided_matrices(model).items() if kind != "summed"}
    biases = {
        f"{n}.bias": kind
        for n, kind in ways.items()
        if kind == "column" and getattr(model.get_submodule(n), "bias", None) is not None
    }
    return {f"{n}.weight": kind for n, kind in ways.items()} | biases


def _leave_part(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Reduces the matrices of a model on the meta device to one tensor-parallel worker's shard, so that the model's operations
    have the shapes of this shard."""
    for name, p in list(model.named_parameters()):
        if tuple(p.shape) != shapes[name]:
            owner, _, own = name.rpartition(".")
            part = torch.nn.Parameter(torch.empty(shapes[name], dtype=p.dtype, device=p.device), requires_grad=p.requires_grad)
            setattr(model.get_submodule(owner), own, part)


def _stacked(recipe: Recipe, model: torch.nn.Module) -> frozenset[str]:
    if not isinstance(recipe, DividesExperts):
        return frozenset()
    own = {id(p) for m in recipe.stacked_experts(model) for p in m.parameters(recurse=False)}
    return frozenset(name for name, p in model.named_parameters() if id(p) in own)


def activations(job: Job, recipe: Recipe, model: torch.nn.Module, content: Content, count: bool = False) -> Activations:
    """Measures the activations of one sample by running the recipe's loss on fake tensors.

    `content`: an input of `recipe.batch` for one sample. `model`: a model from `build`. After this call, this model can't train.
    The model must not use activation checkpointing, because the effect of checkpointing is computed from the bytes that each
    layer keeps. `count`: whether to count FLOPs in addition to the bytes, which is slower.
    """
    _as_it_trains(job, recipe, model)
    counter = FlopCounterMode(display=False)
    with _on_fakes(job, recipe, model, content) as batch:
        meter = Meter(model, checkpointed(model, lambda: recipe.loss(model, batch)))
        with meter, counter if count else nullcontext():
            recipe.loss(model, batch)
        tile = _tile(model)
        size = sum(values.nbytes for values in batch.values())
    return replace(meter.result(), batch=size, flops=3.0 * counter.get_total_flops() if count else 0.0, tile=tile)


def _tile(model: torch.nn.Module) -> Tile | None:
    """Measures a model's largest tiled MLP. Counts the bytes that a tile keeps, the same number of bytes for the gradients of
    these values, and the fp32 sums of the weights' gradients. Returns None without tiled MLPs."""
    tiled = building.gathered_whole(model)
    if not tiled:
        return None
    mlp = max(tiled, key=lambda m: sum(p.numel() for p in m.parameters()))
    width: int = building.shape(cast("PreTrainedModel", model).get_input_embeddings().get_parameter("weight"))[-1]
    rows, kept = tiled_mlp.inside(mlp, width, Meter(model))
    return Tile(rows, 2 * kept // rows, 4 * sum(p.numel() for p in mlp.parameters()))


def work(job: Job, recipe: Recipe, model: torch.nn.Module, contents: tuple[Content, Content]) -> tuple[OperationWork, ...]:
    """Counts the operations of a micro-batch's forward and backward pass by running both on fake tensors.

    `contents`: inputs of `recipe.batch` for two samples and for three samples. `model`: the model that `activations` has used. If
    the model has equal layers, the model runs with one of these layers, and then with two of them. The difference is the work of
    each additional layer.
    """
    _as_it_trains(job, recipe, model)
    stacks = _stacks(model)
    if not stacks:
        return _work(job, recipe, model, contents)
    with _on_fakes(job, recipe, model, contents[0]) as batch:
        checkpointed(model, partial(recipe.loss, model, batch))  # of all layers
    kinds = [kind for stack in stacks for kind in _alike(stack)]
    first = [members[0] for members in kinds]
    with _only(model, stacks, first):
        base = _work(job, recipe, model, contents)
    longer = []
    for members in kinds:
        if len(members) > 1:
            with _only(model, stacks, [*first, members[1]]):
                longer.append((_work(job, recipe, model, contents), len(members) - 1))
    return extended(base, longer)


@contextmanager
def _only(model: torch.nn.Module, stacks: list[torch.nn.ModuleList], some: list[torch.nn.Module]) -> Iterator[None]:
    """Opens a context in which stacks contain only the layers in `some`, in their order."""
    with ExitStack() as patches:
        for stack in stacks:
            whole = stack._modules
            places = [i for i, m in enumerate(whole.values()) if m in some]
            by_id: dict[int, PreTrainedConfig] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}
            configs = [c for c in by_id.values() if len(getattr(c, "layer_types", None) or ()) == len(whole)]
            for config in configs:  # models look up the attention type of a layer by the layer's index
                patches.enter_context(patch.object(config, "layer_types", [config.layer_types[i] for i in places]))
            kept = {str(n): layer for n, layer in enumerate(m for m in whole.values() if m in some)}
            patches.enter_context(patch.object(stack, "_modules", kept))
        yield


def _work(job: Job, recipe: Recipe, model: torch.nn.Module, contents: tuple[Content, Content]) -> tuple[OperationWork, ...]:
    operations = []
    for content in contents:
        with _on_fakes(job, recipe, model, content) as batch:
            inside = checkpointed(model, partial(recipe.loss, model, batch))
            with OperationRecorder(inside) as recorder:
                loss = recipe.loss(model, batch)
                sum((p.weight * p.value for p in loss.parts.values() if p.weight), loss.sum).backward()
        operations.append(recorder.found)
        model.zero_grad(set_to_none=True)
    return grouped(*operations)


def _stacks(model: torch.nn.Module) -> list[torch.nn.ModuleList]:
    """Returns the lists of a transformer's layers: the only list of a model of transformers, or those of diffusers.
    Returns an empty list for other models, such as U-Nets, and for layers with hooks, which need certain other layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 2]
    stacks = [m for m in lists if all(isinstance(child, GradientCheckpointingLayer) for child in m)]
    if len(stacks) == 1:
        return stacks
    backbones = [m for m in model.modules() if hasattr(m, "disable_gradient_checkpointing") and not hasattr(m, "up_blocks")]
    owned = {m for backbone in backbones for m in backbone.children()}
    stacks = [m for m in lists if m in owned]
    return [] if any(layer._forward_hooks or layer._forward_pre_hooks for stack in stacks for layer in stack) else stacks


def _alike(stack: torch.nn.ModuleList) -> list[list[torch.nn.Module]]:
    """Groups layers that have the same type of attention and weights of the same shapes."""
    kinds: dict[tuple[type, str, str], list[torch.nn.Module]] = {}
    for layer in stack:
        ways = [getattr(m, name, None) for m in layer.modules() for name in ("attention_type", "layer_type", "sliding_window")]
        shapes = [tuple(p.shape) for p in layer.parameters()]
        kinds.setdefault((type(layer), str(shapes), str(ways)), []).append(layer)
    return list(kinds.values())


def _as_it_trains(job: Job, recipe: Recipe, model: torch.nn.Module) -> None:
    """Converts a model from `build` to the job's precision, unless the model already has this precision."""
    if not any(isinstance(p, FakeTensor) for p in model.parameters()):
        model.to(dtype_of(job.train.precision))


@contextmanager
def _on_fakes(job: Job, recipe: Recipe, model: torch.nn.Module, content: Content) -> Iterator[Batch]:
    """Yields a content's batch as fake tensors. Within the context, all new tensors are fake. After the context, the model's own
    tensors stay fake."""
    with ExitStack() as stack:
        batch = recipe.batch(content, np.zeros(len(content), dtype=np.int64))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _fake(model)
        stack.enter_context(patch.object(next_token, "block_rows", len))  # same operations for any number of samples
        stack.enter_context(patch.object(tiled_loss, "tile_rows", lambda hidden, _: hidden[..., 0].numel()))
        stack.enter_context(patch.object(tiled_mlp, "tile_rows", lambda _: 1 << 40))
        if not job.data.document_mask or job.train.parallel.sequence > 1:  # shared samples need no mask of all pairs
            stack.enter_context(_one_document())
        yield {k: torch.empty(v.shape, dtype=v.dtype) for k, v in batch.items()}


def _one_document() -> AbstractContextManager[object]:
    """Opens a context in which transformers treats all sequences as not packed.

    In a real run, the values of position_ids show that sequences aren't packed, so transformers uses no mask. Fake position_ids
    have no values. Outside this context, transformers would then make a mask that fits both cases.
    """
    from transformers import masking_utils

    return patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None)


def _fake(model: torch.nn.Module) -> None:
    """Replaces a meta model's parameters and buffers by fake tensors on the CPU. Shared parameters stay shared."""
    fakes: dict[torch.Tensor, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                if p not in fakes:
                    fakes[p] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                module._parameters[name] = fakes[p]
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Lists the modules that activation checkpointing wraps. These are the modules that transformers marks or, if transformers
    marks no module, the members of each `ModuleList`."""
    return [*checkpointing.layers(model)] or list(_listed(model))


def _listed(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _listed(child)


def checkpointed(model: torch.nn.Module, run: Callable[[], object]) -> list[torch.nn.Module]:
    """Lists the modules that activation checkpointing wraps (`layers`). For the models of diffusers, whose classes choose these
    modules in their code, calls `run`, which must run the model once. Remembers the list."""
    parts: list[Any] = [m for m in model.modules() if hasattr(m, "disable_gradient_checkpointing")]  # diffusers' name
    parts = [part for part in parts if part._supports_gradient_checkpointing]
    if not parts:
        return layers(model)
    if model not in _CHECKPOINTED:
        checkpointed_layers: list[torch.nn.Module] = []

        def note(layer: Any, *inputs: object) -> object:
            checkpointed_layers.append(getattr(layer, "__self__", layer))
            return layer(*inputs)

        for part in parts:
            part.enable_gradient_checkpointing(note)
        try:
            run()
        finally:
            for part in parts:
                part.disable_gradient_checkpointing()
        _CHECKPOINTED[model] = list(dict.fromkeys([*checkpointing.layers(model), *checkpointed_layers]))
    return _CHECKPOINTED[model]


class Meter:
    """Counts the bytes that autograd keeps within the context, in total and per layer. The model's own tensors don't count. In
    addition, counts the bytes per layer that selective checkpointing would keep.

    The meter works on fake tensors and on real tensors. Tests compare the two results.
    """

    def __init__(self, model: torch.nn.Module, inside: Sequence[torch.nn.Module] | None = None) -> None:
        """Counts for a model. `inside`: the layers that activation checkpointing wraps; None: `layers`."""
        self.total = self.largest = 0
        self._keys = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._alive: list[torch.Tensor] = []  # keeps tensors alive, because an address is unique only while its tensor exists
        self._inputs: list[int] = []
        self._inside: list[int] = []
        self._dear: list[int] = []
        self._keeping = selective.Keeping()
        self._layers = layers(model) if inside is None else inside
        self._singly = bool(checkpointing.layers(model))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def __enter__(self) -> Meter:
        self._handles = [h for m in self._layers for h in (m.register_forward_pre_hook(self._begin, with_kwargs=True),
                                                           m.register_forward_hook(self._end))]  # fmt: skip
        self._hooks.__enter__()
        self._keeping.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._keeping.__exit__(*error)
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._keys:
            self._keys.add(storage._cdata)
            self._alive.append(tensor)
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor

    def _begin(self, module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors = [
            t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad
        ]
        self._inputs.append(sum(t.numel() * t.element_size() for t in tensors))
        self._inside.append(self.total)
        self._dear.append(self._keeping.bytes)

    def _end(self, *_: object) -> None:
        self._inside[-1] = self.total - self._inside[-1]
        self._dear[-1] = self._keeping.bytes - self._dear[-1]

    def result(self) -> Activations:
        each = tuple(zip(self._inputs, self._inside, self._dear, strict=True))
        return Activations(self.total - sum(self._inside), each, self.largest, singly=self._singly)
