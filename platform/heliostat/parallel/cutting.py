"""Tests whether a model supports samples that are cut over several workers (sequence parallelism).

A model supports this under three conditions: only attention mixes tokens, all attention uses transformers' interface, and the
only masks are causal masks and document masks. Whether a model meets these conditions depends on the architecture's code.

The test needs one process. Each row of a batch is a range of one sample's tokens, and the attention of a small model joins the
rows. The model's logits must match those of the uncut sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from heliostat.config.fields import divisors
from heliostat.errors import ConfigError
from heliostat.parallel import sequence_attention, tiny
from heliostat.parallel.document_attention import Attended
from heliostat.parallel.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "train.parallel.sequence"
PARTS = 4
TOLERANCE = 1e-3  # in standard deviations of the logits; rounding is about 1e-6

_known: dict[str, str] = {}  # faults of the models that this process has tested


class UnfitForCutting(Exception):
    """Reports why a model's samples can't be cut."""


def require(recipe: LanguageModel, parts: int) -> None:
    """Raises ConfigError unless samples of the recipe's model can be cut over `parts` workers."""
    _require_heads(recipe, parts)
    kind = recipe.config.model_type
    if recipe.router_weight is not None:
        raise ConfigError(
            f"{KEY}: not supported with the router's loss of {kind!r}, which needs whole samples. Set "
            f"model.output_router_logits to false, or {KEY} to 1"
        )
    how = [recipe.length, recipe.document_mask]
    if fault := tiny.remembered(_known, recipe, how, lambda: tiny.tried(recipe, _fault)):
        raise ConfigError(f"{KEY}: not supported for {kind!r}: {fault}. Set this key to 1")


def _require_heads(recipe: LanguageModel, parts: int) -> None:
    """Raises ConfigError unless every worker gets the same number of attention heads. There may be fewer key/value heads than
    workers."""
    if not isinstance(getattr(recipe.config.get_text_config(decoder=True), "num_attention_heads", None), int):
        raise ConfigError(
            f"{KEY}: not supported for {recipe.config.model_type!r}, which has no attention heads. Set this key to 1"
        )
    heads, shared, _ = sequence_attention.sizes(recipe.config)
    fits = [n for n in divisors(heads) if (shared % n == 0 or n % shared == 0) and recipe.length % n == 0]
    if parts not in fits:
        what = f"{heads} attention heads" + (f" and {shared} key/value heads" if shared < heads else "")
        raise ConfigError(
            f"{KEY}: {parts} workers can't share the model's {what} evenly. Use {' or '.join(map(str, fits))} (the "
            "number must divide the heads, and be a divisor or a multiple of the key/value heads)"
        )


def _fault(small: LanguageModel) -> str:
    try:
        off = difference(small)
    except UnfitForCutting as e:
        return str(e)
    if off <= TOLERANCE:
        return ""
    return (
        "something other than full attention mixes tokens, for example windows or a recurrent state (the logits "
        f"differ by {off:.1%})"
    )


@torch.no_grad()
def difference(recipe: LanguageModel) -> float:
    """Computes the largest difference between the logits of a cut sample and of the uncut sample, in a small model. The unit is
    the standard deviation of the logits."""
    torch.manual_seed(0)
    model = recipe.build().eval()
    tiny.stir(model)
    tokens = np.random.default_rng(0).integers(6, 90, (1, tiny.LENGTH)).astype(np.int32)
    tokens[:, tiny.LENGTH // 3 - 1 :: tiny.LENGTH // 3] = tiny.END  # so that cuts go through documents
    batch = recipe.batch(tokens)
    whole = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    _put_together(model, recipe.document_mask)
    stretches = [recipe.cut(batch, part, PARTS) for part in range(PARTS)]
    rows = {k: torch.cat([one[k] for one in stretches]) for k in ("input_ids", "position_ids")}
    cut = model(**rows).logits.reshape(whole.shape)
    return float((cut - whole).abs().max() / whole.std())


def _put_together(model: PreTrainedModel, documents: bool) -> None:
    """Makes a model treat the rows of a batch as consecutive token ranges of one sample."""
    name = model.config._attn_implementation
    if name == "eager":
        raise UnfitForCutting("the model's attention has only the implementation 'eager', which needs a causal mask")
    core, (heads, shared, width) = sequence_attention.core(model), sequence_attention.sizes(model.config)

    def exchanged(module: torch.nn.Module, *stretches: torch.Tensor, **options: object) -> Attended:
        *rows, documents_of = stretches
        shapes = [(x.shape[1], x.shape[3]) for x in rows]
        if shapes != [(heads, width), (shared, width), (shared, width)]:
            raise UnfitForCutting(f"the layers have different heads or widths of queries, keys, and values: {shapes}")
        whole = [x.transpose(0, 1).flatten(1, 2)[None] for x in rows]
        attended, _ = core(module, *whole, documents_of, **options)
        return attended.unflatten(1, (PARTS, -1)).squeeze(0), None

    sequence_attention.install(
        model, f"{sequence_attention.NAME}-rows", sequence_attention.Attention(exchanged, _joined if documents else None)
    )


def _joined(positions: torch.Tensor) -> torch.Tensor:
    return positions.reshape(1, -1)
