"""Draws the next token of each row of a batch, with the row's own temperature, `top_p`, and random generator. Batch inference
and serving use this module.

The token is the argmax of logits / temperature plus Gumbel noise (Gumbel 1954), among the likeliest tokens that `top_p` allows.
This argmax is a sample from the softmax. The noise comes from the row's own generator, so it doesn't depend on the batch. At
temperature 0, no noise is added.

heliostat generates text in three ways. All three share the code for prompts, chat templates, and end tokens. The last two also
share this module:

- `heliostat model generate`, and a model that MLflow serves, run `recipes/text/server.py`, one prompt at a time. The server
  samples as `transformers` does, with torch's global generator. If it used this module instead, recorded seeds would give other
  texts. MLflow copies `server.py` into the model, so `server.py` imports nothing of heliostat.
- Batch inference (`inference/batch/engines.py`) runs `generate` of `transformers` with this module's noise. `generate` keeps
  the states of models such as Mamba, so each token costs the same.
- The endpoint (`apps/serve/engine.py`) computes each step itself, because rows join and leave the batch between two tokens.
  `generate` does not support this. If a cache contains more than keys and values, the endpoint computes all earlier tokens again,
  in quadratic time.

On a GPU, vLLM can replace the second and the third way. vLLM samples with its own noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch

MOST_LOGPROBS = 20  # maximum number of log probabilities per token
WRITES = ("continue", "chat")  # the tasks of batch inference that sample their answers


class Chosen(TypedDict):
    """Holds the log probability of the sampled token, and the log probabilities of the likeliest tokens as (id, value)."""

    chosen: float
    best: list[tuple[int, float]]


@dataclass
class Draw:
    """Holds a row's sampling parameters, and the state of its random generator."""

    temperature: float
    top_p: float
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Returns a token id for each row of logits [rows, vocabulary]. At temperature 0, this is the likeliest token."""
    rows = [i for i, draw in enumerate(draws) if draw.temperature]
    chosen = logits.argmax(-1)
    if rows:
        chosen[rows] = noisy(logits[rows], [draws[i] for i in rows]).argmax(-1)
    return chosen.tolist()


def noisy(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Returns scores [rows, vocabulary], float64. The argmax of a row is the row's sample. Scores outside `top_p` are -inf."""
    scores = _within(logits.double(), draws)
    noise = torch.stack([torch.rand(scores.shape[-1], generator=draw.generator, dtype=torch.float64) for draw in draws])
    return scores - torch.log(-torch.log(noise)).to(scores.device)


def _within(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Divides each row by its temperature, and sets all tokens outside `top_p` to -inf."""

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
    """Returns the log probabilities of the sampled token and of the `most` likeliest tokens, before temperature and `top_p`."""
    logs = torch.log_softmax(logits.double(), -1)
    best = logs.topk(min(most, len(logs)))
    return {"chosen": float(logs[token]), "best": list(zip(best.indices.tolist(), best.values.tolist(), strict=True))}
