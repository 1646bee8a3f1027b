"""Reads snapshots of averages of the weights, `averages/step-00000100` in a run's folder, and combines them into other averages.

A snapshot has the form of a checkpoint that contains only averages. The saver writes a snapshot before the checkpoint of the same
step. So after any failure, a run that resumes has all snapshots up to its checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heliostat.checkpoint import layout
from heliostat.checkpoint.columns import ROWS
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.errors import CorruptCheckpointError
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def steps(run: Location) -> list[int]:
    """Lists the steps that have a snapshot folder, complete or not, in ascending order."""
    return sorted(run_folder.step_of(name) for name in run.join(run_folder.AVERAGES).folders())


def up_to(run: Location, step: int) -> list[SavedCheckpoint]:
    """Opens the complete snapshots up to a step, in ascending order. Logs a warning for each damaged snapshot."""
    opened = []
    for one in steps(run):
        if one <= step:
            try:
                opened.append(layout.open_folder(run_folder.averages(run, one), one))
            except CorruptCheckpointError as e:
                log.warning("%s. heliostat leaves out this snapshot", e)
    return opened


@dataclass(frozen=True)
class Summand:
    """Describes an average in a sum of averages: its snapshot, its kind, and its factor."""

    saved: SavedCheckpoint
    kind: str
    factor: float


@dataclass(frozen=True)
class SummedAverage:
    """Provides tensors that are sums of averages in several snapshots. Only two pieces of a tensor are in memory at a time."""

    summands: Sequence[Summand]

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        """Yields a parameter's sum as flat fp32 pieces of at most 32 MiB, in the order of its elements. Sums in fp64."""
        import torch

        first = self.summands[0]
        numel = first.saved.numel(f"{first.kind}.{name}")
        for begin in range(0, numel, layout.PIECE // 8):
            count = min(layout.PIECE // 8, numel - begin)
            total, piece = torch.zeros(count, dtype=torch.float64), torch.empty(count, dtype=torch.float32)
            for one in self.summands:
                one.saved.read_into(f"{one.kind}.{name}", ROWS, begin, piece)
                total.add_(piece.double(), alpha=one.factor)
            yield total.float()

    def read(self, name: str) -> torch.Tensor:
        """Computes a parameter's complete sum, fp32 and flat."""
        import torch

        return torch.cat(list(self.stream(name)))
