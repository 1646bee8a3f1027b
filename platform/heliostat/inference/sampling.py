"""Chooses the next token of each row of a batch by its own temperature, share, and noise: of batch inference, and of serving.

The token is the largest of logits / temperature plus Gumbel noise (Gumbel 1954), within the likeliest `top_p`: distributed as a
draw from the softmax. The noise is of the row's own generator, so that it is the same in whatever batch. Temperature 0 adds none.

heliostat generates text in three ways. They share prompts, chat templates, ends, and (the last two) this module:

- `heliostat model generate` and a model that MLflow serves run `recipes/text/server.py`, one prompt at a time with the sampling
of
  `transformers`. Its draws come from torch's own generator: this module would give other texts for recorded seeds. MLflow copies
  that file into the model, so it imports nothing of heliostat.
- Batch inference (`inference/batch/engines.py`) runs `generate` of `transformers` with this module's noise. `generate` keeps the
  states of models such as Mamba, so each token costs the same.
- The endpoint (`apps/serve/engine.py`) steps rows itself, since they come and go between two tokens, which `generate` does not
  allow. Where a cache does not hold keys and values alone, it computes a row's earlier tokens again: time grows with the square.

vLLM replaces the last two on a GPU. It draws with its own noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch

MOST_LOGPROBS = 20  # of a token
WRITES = ("continue", "chat")  # the tasks of batch inference whose answers are sampled


class Chosen(TypedDict):
    """Holds the log probability of a token that was chosen, and those of the likeliest with their ids."""

    chosen: float
    best: list[tuple[int, float]]


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
    """Returns a token for each row of logits [rows, vocabulary]; the likeliest at temperature 0."""
    rows = [i for i, draw in enumerate(draws) if draw.temperature]
    chosen = logits.argmax(-1)
    if rows:
        chosen[rows] = noisy(logits[rows], [draws[i] for i in rows]).argmax(-1)
    return chosen.tolist()


def noisy(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Returns scores [rows, vocabulary], float64, the largest of which is a row's draw; -inf outside its `top_p`."""
    scores = _within(logits.double(), draws)
    noise = torch.stack([torch.rand(scores.shape[-1], generator=draw.generator, dtype=torch.float64) for draw in draws])
    return scores - torch.log(-torch.log(noise)).to(scores.device)


def _within(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Divides each row by its temperature, and leaves only its likeliest tokens, of the share `top_p` together."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None]

    scores, share = scores / column([draw.temperature for draw in draws]), column([draw.top_p for draw in draws])
    if all(draw.top_p >= 1 for draw in draws):
        return scores
    ordered, places = torch.sort(scores)
    out = (ordered.softmax(-1).cumsum(-1) <= 1 - share) & (share < 1)
    out[..., -1] = False
    return scores.masked_fill(out.scatter(1, places, out), -torch.inf)


def logprobs(logits: torch.Tensor, token: int, most: int) -> Chosen:
    """Returns the logarithm of the chosen token's probability under the model itself, and those of the likeliest."""
    logs = torch.log_softmax(logits.double(), -1)
    best = logs.topk(min(most, len(logs)))
    return {"chosen": float(logs[token]), "best": list(zip(best.indices.tolist(), best.values.tolist(), strict=True))}
