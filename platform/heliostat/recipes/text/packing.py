"""Tests whether packed documents attend to each other in a model.

A change of the text before a document boundary must not change the logits after the boundary. heliostat tests each model instead
of keeping a list of architectures. The result depends on each architecture's code, so a list would become outdated.
"""

from __future__ import annotations

import numpy as np
import torch

from heliostat.errors import ConfigError
from heliostat.parallel import tiny
from heliostat.parallel.language_model import LanguageModel
from heliostat.parallel.tiny import LENGTH

END = 1
LAST = LENGTH // 6  # tokens of the last document, whose logits are compared
BOUNDARY = LENGTH - LAST
TOLERANCE = 1e-3  # as a share of the logits' difference before the boundary; rounding is about 1e-6


_known: dict[str, float] = {}  # leaks that were measured in this process


def require_apart(recipe: LanguageModel) -> None:
    """Raises ConfigError if packed documents attend to each other in the model, with the job's attention, positions, and
    activation checkpointing."""
    kind, how = recipe.config.model_type, [recipe.length, recipe.checkpointing, recipe.attention]
    try:
        leaked = tiny.remembered(_known, recipe, how, lambda: tiny.attempt(recipe, lambda small: leak(logits(small))))
    except tiny.UntriedError as e:
        raise ConfigError(
            f"data.document_mask: can't check whether {kind!r} keeps packed documents apart ({e}). Set this key to false"
        ) from e
    if not leaked <= TOLERANCE:
        raise ConfigError(
            f"data.document_mask: {kind!r} attends across packed documents: a change in one document also changes the logits "
            f"of the next document (by {leaked:.1%}, relative to the change in the first). Set data.document_mask to false"
        )


def packings() -> list[np.ndarray]:
    """Makes three samples [1, tokens] with the same last document. Before this document, the samples have one long document, a
    different long document, and many short documents."""
    draw = np.random.default_rng(0)
    last = draw.integers(6, 90, LAST)
    before = [draw.integers(6, 90, BOUNDARY) for _ in range(2)]
    for tokens in before:
        tokens[-1] = END
    many = before[0].copy()
    many[LAST - 1 :: LAST] = END
    return [np.concatenate([first, last])[None].astype(np.int32) for first in (*before, many)]


def leak(logits: list[torch.Tensor]) -> float:
    """Computes the effect of earlier documents on the last document, from the logits [1, tokens, vocabulary] of each sample of
    `packings`.

    Returns the size of the samples' differences in the last document, divided by the size of the differences before this
    document.
    """
    first, *others = [x.float() for x in logits]
    before = (others[0][:, : BOUNDARY - 1] - first[:, : BOUNDARY - 1]).abs().max().item()
    behind = max((o[:, BOUNDARY:] - first[:, BOUNDARY:]).abs().max().item() for o in others)
    return behind / before if before else float("inf")


@torch.no_grad()
def logits(small: LanguageModel) -> list[torch.Tensor]:
    """Computes the logits of the three samples of `packings`, with a small model in which every part affects the logits."""
    torch.manual_seed(0)
    model = small.build()
    tiny.stir(model)
    parts = []
    for tokens in packings():
        torch.manual_seed(1)  # so that dropout is the same
        parts.append(model(**{k: v for k, v in small.batch(tokens).items() if k != "labels"}).logits)
    return parts
