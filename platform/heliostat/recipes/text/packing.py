"""Tests whether packed documents attend to each other in a model: a change of the text before a document boundary must not move
the logits behind it. Each architecture's own code decides that, and no list of names could keep up with it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from heliostat.errors import ConfigError
from heliostat.parallel import tiny
from heliostat.parallel.tiny import LENGTH

END = 1
LAST = LENGTH // 6  # tokens of the document that is looked at
BOUNDARY = LENGTH - LAST
TOLERANCE = 1e-3  # of the logits' own difference before the boundary: rounding is some 1e-6 of it


_known: dict[str, float] = {}  # leaks that were measured in this process


def require_apart(recipe: Any) -> None:
    """Raises ConfigError unless the model, with its attention, positions and checkpointing, keeps packed documents apart."""
    kind = recipe.config.model_type
    how = [recipe.length, recipe.checkpointing, recipe.attention]
    key = json.dumps([recipe.config.to_dict(), *how], default=str, sort_keys=True)
    if key not in _known:
        _known[key] = leak(_tried(recipe))
    if not _known[key] <= TOLERANCE:
        raise ConfigError(
            f"data.document_mask: packed documents see each other in {kind!r}: other text before a boundary moves the logits "
            f"behind it ({_known[key]:.1%} of the change before it); set it to false"
        )


def _tried(recipe: Any) -> list[torch.Tensor]:
    reason = "no small model of it can be made"
    for config in tiny.shrunk(recipe.config, recipe.length):
        small = tiny.of(recipe, config)
        try:
            if (size := tiny.parameters(small)) <= tiny.LARGEST:
                return logits(small)
            reason = f"the smallest model of it has {size:,} parameters"
        except Exception as e:  # noqa: BLE001  whatever this architecture's own code raises
            reason = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[-1].strip()}"
    raise ConfigError(
        f"data.document_mask: could not try whether {recipe.config.model_type!r} keeps packed documents apart ({reason[:200]}); "
        "set it to false"
    )


def packings() -> list[np.ndarray]:
    """Makes samples [1, tokens] with the same last document: after one long document, another, and many short ones."""
    draw = np.random.default_rng(0)
    last = draw.integers(6, 90, LAST)
    before = [draw.integers(6, 90, BOUNDARY) for _ in range(2)]
    for tokens in before:
        tokens[-1] = END
    many = before[0].copy()
    many[LAST - 1 :: LAST] = END
    return [np.concatenate([first, last])[None].astype(np.int32) for first in (*before, many)]


def leak(logits: list[torch.Tensor]) -> float:
    """Divides the difference of the logits [1, tokens, vocabulary] of `packings` behind the boundary by that before it."""
    first, *others = [x.float() for x in logits]
    before = (others[0][:, : BOUNDARY - 1] - first[:, : BOUNDARY - 1]).abs().max().item()
    behind = max((o[:, BOUNDARY:] - first[:, BOUNDARY:]).abs().max().item() for o in others)
    return behind / before if before else float("inf")


@torch.no_grad()
def logits(recipe: Any) -> list[torch.Tensor]:
    """Computes the logits of `packings` with a small model of the recipe's, whose weights give every part an effect."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = recipe.build()
            for p in model.parameters():
                p.normal_(std=0.2) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
            out = []
            for tokens in packings():
                torch.manual_seed(1)  # the same dropout
                inputs = {k: v for k, v in recipe.batch(tokens).items() if k != "labels"}
                out.append(model(**inputs).logits)
            return out
    finally:
        torch.set_num_threads(threads)
