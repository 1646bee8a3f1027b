"""Checks at the first step of a run that the trained model is still the reference. Its answers then have the reference's
log-probabilities, except for rounding. All functions are pure.

A token's log-probability is the difference of a logit and the logarithm of a sum, which are results of many rounded layers. With
SmolLM2-135M (30 layers), the values of two batches of other shapes differ by a standard deviation of 15 (fp16) to 24 (fp32) units
of roundoff. The errors of tokens are independent, so those of sums grow with the square root of the tokens, and those of means
shrink with the square root of the pairs. The bound has a factor of 8 for larger models and logits, and a bias of one unit per
token. Differences below FLOOR matter to no training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4, "nf4": 2.0**-3}  # half a unit in the last place
TOKEN_ERROR = 24  # standard deviation of a token's log-probability, in units of roundoff
FACTOR = 8
FLOOR = 0.01  # nats


@dataclass(frozen=True)
class ComparedModel:
    """Describes the trained model, or a reference. `name`: for an error message; `digest`: of its weights; `precision`: a key of
    ROUNDOFF."""

    name: str
    digest: str
    precision: str

    def __str__(self) -> str:
        return f"{self.name} ({self.digest}, {self.precision})"


def bound(precisions: list[str], tokens: int, pairs: int) -> float:
    """Computes the largest mean difference of log-probabilities that rounding explains, in nats.

    `precisions`: of both models; `tokens`: the maximum of an answer; `pairs`: the number of pairs in the mean.
    """
    roundoff = max(ROUNDOFF[precision] for precision in precisions)
    return max(FLOOR, roundoff * (FACTOR * TOKEN_ERROR * math.sqrt(tokens / pairs) + tokens))


def message(policy: ComparedModel, references: list[ComparedModel], ratios: Mapping[str, float], limit: float) -> str:
    """Describes a model that isn't its reference. `ratios`: see `DPO.check_first_step`; `limit`: their `bound`."""
    apart = " and ".join(f"of {name} answers by {ratio:+.3g}" for name, ratio in ratios.items())
    return (
        f"at step 1, the model isn't its reference: the log-probabilities {apart} nats differ on average, and rounding explains "
        f"{limit:.2g}. The model is {policy}. The reference is {', '.join(map(str, references))}"
    )
