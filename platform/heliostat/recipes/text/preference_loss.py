"""Computes the losses of preference optimization from the log-probabilities of answers. All functions are pure.

With r = log pi(answer) - log pi_ref(answer) for the model pi and its reference, summed over an answer's tokens:

- `sigmoid`: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), with h = r(chosen) - r(rejected). This is DPO (Rafailov et al.
  2023, arXiv 2305.18290, equation 7). With label smoothing e > 0, it is conservative DPO (Mitchell 2023).
- `ipo`: (r(chosen) / tokens(chosen) - r(rejected) / tokens(rejected) - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036,
  equation 17, where beta is tau). The paper doesn't divide by the numbers of tokens. TRL does, after asking the authors, so that
  the loss doesn't grow with the answers' lengths.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

PreferenceLoss = Literal["sigmoid", "ipo"]


class ComparedAnswers(NamedTuple):
    """Holds values of pairs. `policy`, `reference`: log-probabilities in nats, [pairs, 2]: of the chosen and the rejected answer.
    `tokens`: the answers' numbers of tokens, [pairs, 2]."""

    policy: torch.Tensor
    reference: torch.Tensor
    tokens: torch.Tensor

    @property
    def ratios(self) -> torch.Tensor:
        return self.policy - self.reference


def losses(answers: ComparedAnswers, kind: PreferenceLoss, beta: float, smoothing: float) -> torch.Tensor:
    """Computes the loss of each pair, [pairs]."""
    if kind == "ipo":
        chosen, rejected = (answers.ratios / answers.tokens).unbind(1)
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    chosen, rejected = answers.ratios.unbind(1)
    logits = beta * (chosen - rejected)
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def measures(answers: ComparedAnswers, beta: float) -> dict[str, torch.Tensor]:
    """Computes values for the log by name, [pairs] each. An answer's reward is beta times its ratio, and the margin is the
    difference of the two rewards. The accuracy is 1 if the margin is positive, 1/2 if it is 0, else 0."""
    rewards = beta * answers.ratios.detach()
    margin = rewards[:, 0] - rewards[:, 1]
    return {
        "margin": margin,
        "accuracy": (torch.sign(margin) + 1) / 2,
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
        "chosen_logprob": answers.policy[:, 0].detach(),
        "rejected_logprob": answers.policy[:, 1].detach(),
    }
