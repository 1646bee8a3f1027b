"""Shrinks a model's configuration, so that a test of the architecture's code takes a second for a model of any size.

The small configuration keeps every switch, the kinds of layers and their order, the width of heads, and the number of query heads
per key head. Windows and position ranges that are shorter than a sample stay shorter. The small configuration has fewer layers,
heads, and experts, smaller widths, and a smaller vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from heliostat.parallel.language_model import CHOSEN, EXPERTS, LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

T = TypeVar("T")

LENGTH = 48  # tokens of a sample
VOCABULARY = 96
END = 1  # the token that ends documents
LAYERS = 8  # enough for the periodic patterns of transformers' configurations
LARGEST = 80_000_000  # parameters of a tested model

HEADS = ("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "attention_heads")
DEPTHS = ("num_hidden_layers", "decoder_layers", "encoder_layers", "num_layers")
INNER = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "decoder_ffn_dim",
         "encoder_ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "expert_ffn_hidden_size", "dense_intermediate_size",
         "moe_shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp", "block_ff_dim")  # fmt: skip
RANKS = ("q_lora_rank", "kv_lora_rank", "o_lora_rank")
REACHES = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings", "attention_window_size", "window_size")
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
)  # architectures reject fewer positions than a sample has tokens


class UntriedError(Exception):
    """Reports why no small model of an architecture could be tested."""


def shrunk(config: PreTrainedConfig, length: int, heads: int = 2) -> Iterator[PreTrainedConfig]:
    """Yields smaller configurations of a model, with at most `heads` heads. The configuration that is most likely to be valid
    comes first. `length`: tokens per sample of the model."""
    keys = config.to_dict()
    names = config.attribute_map
    for most, layers in ((heads, LAYERS), (heads, None), (None, None)):
        smaller = _Small(keys, names, length, most, layers).made
        try:
            small = type(config).from_dict(smaller)
        except Exception:  # noqa: BLE001  breaks a rule of the architecture; the next configuration may be valid
            continue
        small.use_cache = small.get_text_config(decoder=True).use_cache = False
        yield small


def attempt(recipe: LanguageModel, what: Callable[[LanguageModel], T], heads: int = 2, largest: float | None = None) -> T:
    """Calls `what` with small versions of the recipe until a call succeeds, and returns the result. Raises UntriedError if every
    call fails.

    Every `build` builds the small model again, with kernels that a CPU supports. `heads`: the maximum number of heads. `largest`:
    the maximum number of parameters, by default LARGEST.
    """
    reason, most = "no small model of the architecture can be built", LARGEST if largest is None else largest
    for config in shrunk(recipe.config, recipe.length, heads):
        small = recipe.small(config, LENGTH, END)
        try:
            if (size := parameters(small.build)) > most:
                reason = f"the architecture's smallest model has {size:,} parameters"
                continue
            with one_thread(), torch.random.fork_rng(devices=[]):
                return what(small)
        except Exception as e:  # noqa: BLE001  the architecture's code can raise anything
            reason = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[-1].strip()[:200]}"
    raise UntriedError(reason)


@contextmanager
def one_thread() -> Iterator[None]:
    """Makes torch use one thread inside the context, which is faster for small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tried(recipe: LanguageModel, fault: Callable[[LanguageModel], str], heads: int = 2) -> str:
    """Returns the fault of a small version of the recipe, or "" if there is no fault. If no small version can run, the returned
    text is "the check failed" with the reason."""
    try:
        return attempt(recipe, fault, heads)
    except UntriedError as e:
        return f"the check failed ({e})"


def remembered(known: dict[str, T], recipe: LanguageModel, how: Sequence[object], find: Callable[[], T]) -> T:
    """Returns the earlier result for the same configuration and `how` in this process. If there is no earlier result, computes
    the result with `find`."""
    key = json.dumps([recipe.config.to_dict(), *how], default=str, sort_keys=True)
    if key not in known:
        known[key] = find()
    return known[key]


def tokens(small: LanguageModel) -> np.ndarray:
    """Draws the tokens of two samples, int32 [2, length]. No token ends a document."""
    return np.random.default_rng(0).integers(6, 90, (2, small.length)).astype(np.int32)


@torch.no_grad()
def stir(model: torch.nn.Module) -> None:
    """Draws random weights, so that every part of a model affects the model's logits."""
    for p in model.parameters():
        p.normal_(std=0.2) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))


def loss_and_gradient(small: LanguageModel, model: torch.nn.Module) -> torch.Tensor:
    """Computes a small model's loss and its complete gradient, in one vector that begins with the loss. Dropout is off. The
    weights are random, but equal in each call, and every part of the model affects the loss."""
    torch.manual_seed(0)
    for p in model.eval().parameters():
        p.data.normal_(std=0.2) if p.dim() > 1 else p.data.normal_(1.0, 0.1)
        p.grad = None
    loss = small.loss(model, small.batch(tokens(small))).sum
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def same(right: torch.Tensor, mine: torch.Tensor, tolerance: float) -> bool:
    """Checks whether two results of `loss_and_gradient` are equal within a relative `tolerance`."""
    if right.shape != mine.shape:
        return False
    return bool(max(abs(mine[0] - right[0]) / right[0], (mine - right).norm() / right.norm()) <= tolerance)


def parameters(build: Callable[[], torch.nn.Module]) -> int:
    """Counts the parameters of the model that `build` makes. Needs no memory for the parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


class _Small:
    """Shrinks a configuration and its nested configurations to at most `heads` heads and `layers` layers. `made`: the result."""

    def __init__(self, keys: dict[str, Any], names: dict[str, str], length: int, heads: int | None, layers: int | None) -> None:
        self.made, self.names, self.length = copy.deepcopy(keys), names, length
        for name, part in keys.items():
            if isinstance(part, dict) and "model_type" in part:
                self.made[name] = _Small(part, {}, length, heads, layers).made
        self._tokens()
        self._widths(heads)
        self._experts()
        self._reach(self.made)
        if layers:
            self._layers(layers)

    def _get(self, name: str) -> Any:
        return self.made.get(self.names.get(name, name))

    def _set(self, name: str, value: object) -> None:
        name = self.names.get(name, name)
        if self.made.get(name) is not None:
            self.made[name] = value

    def _tokens(self) -> None:
        for name, value in self.made.items():
            if "vocab_size" in name and isinstance(value, int):
                self.made[name] = VOCABULARY
            elif name.endswith("token_id") and value is not None:
                self.made[name] = 0

    def _widths(self, heads: int | None) -> None:
        width, many, groups = self._get("hidden_size"), self._get("num_attention_heads"), self._get("num_key_value_heads")
        if not isinstance(width, int):
            return
        if not isinstance(many, int):
            for name, value in list(self.made.items()):
                if isinstance(value, int) and value and value % width == 0 and width > 128:
                    self.made[name] = value // width * 128
            return
        few = min(heads or many, many)
        explicit = isinstance(self._get("head_dim"), int) and "qk_rope_head_dim" not in self.made
        each = self._get("head_dim") if explicit else max(1, width // many)
        small = min(width, few * each)
        for name, value in list(self.made.items()):
            if value == width and name not in ("num_attention_heads", "vocab_size"):
                self.made[name] = small
        for name in HEADS:
            self._set(name, few)
        if isinstance(groups, int):
            self._set("num_key_value_heads", few if groups == many else 1 if groups == 1 else max(1, few // 2))
        for name in INNER:
            self._set(name, 64 if isinstance(self._get(name), int) else [64] * len(self._get(name) or []))
        for name in RANKS:
            self._set(name, 32)
        expand, one = self._get("mamba_expand"), self._get("mamba_d_head")
        if isinstance(one, int) and isinstance(expand, int | float):
            self._set("mamba_n_heads", max(1, int(expand * small) // one))

    def _experts(self) -> None:
        for name in EXPERTS:
            value = self._get(name)
            if isinstance(value, int) and value > 8:
                self._set(name, 8)
        for name in CHOSEN:
            value = self._get(name)
            if isinstance(value, int) and value > 4:
                self._set(name, 4)
        for name in ("n_group", "topk_group"):
            self._set(name, 1)

    def _reach(self, part: dict[str, object]) -> None:
        """Scales windows and position ranges. Ranges that are longer than a sample stay longer, and shorter ranges stay
        shorter."""
        for name, value in part.items():
            if isinstance(value, dict) and "model_type" not in value:
                self._reach(value)
            elif name in POSITIONS and isinstance(value, int):
                part[name] = 4 * LENGTH
            elif name in REACHES and isinstance(value, int):
                part[name] = 4 * LENGTH if value >= self.length else max(LENGTH // 6, value * LENGTH // self.length)

    def _layers(self, most: int) -> None:
        depth = self._get("num_hidden_layers")
        if not isinstance(depth, int) or depth <= most:
            return
        lists = [k for k, v in self.made.items() if isinstance(v, list) and len(v) == depth]
        kinds = [list(map(str, self.made[k])) for k in lists]
        few = max([most, *(1 + max(k.index(kind) for kind in set(k)) for k in kinds if len(set(k)) <= 8)])
        for name in lists:
            self.made[name] = self.made[name][:few]
        for name in DEPTHS:
            self._set(name, few)
