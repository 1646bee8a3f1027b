"""Defines two abilities of recipes: to audit the loss masks of the datasets before the first step, and to check the first step.

An audit is plain data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

if TYPE_CHECKING:
    import torch

    from heliostat.recipes.protocol import Batch


class SourceAudit(TypedDict):
    """Describes the loss mask of a source.

    - `name`, `path`, `template`: the dataset's name, its folder, and the digest of its chat template
    - `conversations`, `rows`, `tokens`, `trained`, `trained_share`, `fill`: of the complete dataset. `fill`: the share of the
      packs' tokens that aren't padding
    - `sampled_rows`, `untrained_rows`, `sampled_turns`, `trained_ends`: of the rows that the audit read. `sampled_turns`: trained
      turns; `trained_ends`: those whose end is trained. `unreadable`: damaged row groups, which the audit left out
    """

    name: str
    path: str
    template: str
    conversations: int
    rows: int
    tokens: int
    trained: int
    trained_share: float
    fill: float
    sampled_rows: int
    untrained_rows: int
    sampled_turns: int
    trained_ends: int
    unreadable: int


class MarkedText(TypedDict):
    """Contains a part of a conversation. `trained`: whether the model learns to write this text."""

    text: str
    trained: bool


class MaskAudit(TypedDict):
    """Contains the audit of each source, some conversations with their loss masks, and warnings, one line each."""

    sources: list[SourceAudit]
    examples: list[list[MarkedText]]
    warnings: list[str]


class Audits(ABC):
    """Audits its loss mask before the first step, and counts the trained tokens of each source."""

    @abstractmethod
    def audit(self) -> MaskAudit:
        """Reads some rows of the bound datasets, and compares them with the datasets' facts. Runs on the driver.

        Raises ConfigError if too many rows have nothing to train, or if the rows contradict the facts.
        """

    @abstractmethod
    def trained(self, batch: Batch) -> torch.Tensor:
        """Counts the trained tokens of each sample of a batch on the host, int64 [samples]. Their sum is the batch's `terms`."""


class ChecksFirstStep(ABC):
    """Checks the first step of a run, when it is reported."""

    @abstractmethod
    def check_first_step(self, parts: dict[str, float]) -> None:
        """Raises ConfigError if the step shows a mistake. `parts`: the means of `Loss.parts` over the global batch, by name. All
        workers call this method with the same values."""
