"""Chooses the next token of each row of a batch by its own temperature, share and noise: the same as batch inference draws.

scores = logits / temperature, without what is outside of the likeliest `top_p`, and noise of the row's own generator is added
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from heliostat.inference.vllm_terms import Chosen


@dataclass
class Draw:
    """Holds how a row's tokens are drawn, and the state of its noise."""

    temperature: float
    top_p: float
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Returns a token for each row; the likeliest at temperature 0."""
    rows = [i for i, draw in enumerate(draws) if draw.temperature]
    chosen = logits.argmax(-1)
    if rows:
        drawn = [draws[i] for i in rows]
        scores = within(logits[rows].double(), drawn)
        size = scores.shape[-1]
        noise = torch.stack([torch.rand(size, generator=draw.generator, dtype=torch.float64) for draw in drawn])
        chosen[rows] = (scores - torch.log(-torch.log(noise)).to(scores.device)).argmax(-1)
    return chosen.tolist()


def within(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Divides each row by its temperature, and leaves only its likeliest tokens, of the share `top_p` together."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([[getattr(draw, name)] for draw in draws], dtype=scores.dtype, device=scores.device)

    scores = scores / column("temperature")
    if all(draw.top_p >= 1 for draw in draws):
        return scores
    ordered, places = torch.sort(scores)
    out = (ordered.softmax(-1).cumsum(-1) <= 1 - column("top_p")) & (column("top_p") < 1)
    out[..., -1] = False
    return scores.masked_fill(out.scatter(1, places, out), -torch.inf)


def logprobs(logits: torch.Tensor, token: int, most: int) -> Chosen:
    """Returns the logarithm of the chosen token's probability under the model itself, and those of the likeliest."""
    logs = torch.log_softmax(logits.double(), -1)
    best = logs.topk(min(most, len(logs)))
    return {"chosen": float(logs[token]), "best": list(zip(best.indices.tolist(), best.values.tolist(), strict=True))}
