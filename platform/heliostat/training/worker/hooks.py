"""Defines what a run does around its steps: evaluation, checkpoints, checks, each a `Hook` that the loop (`step`) calls.

To add one, derive a class from `Hook`, override what it needs, and list it in `worker`. Nothing in a hook may wait for the device
or for another worker at every step.
"""

from __future__ import annotations

from typing import NamedTuple


class Due(NamedTuple):
    """Describes what follows a step; the same on every worker.

    `last`: it is the run's last one; `reports`: its numbers are posted; `evaluates`, `saves`, `keeps`: the model is scored, saved
    in storage, and copied into memory; `holds`: the workers then wait for a decision.
    """

    last: bool
    reports: bool
    evaluates: bool
    saves: bool
    keeps: bool
    holds: bool


class Hook:
    """Does something around the steps; every worker calls all hooks at the same points, in the same order."""

    def before_step(self, step: int) -> None:
        """Acts before a step, counted from 0."""

    def after_step(self, done: int, norm: float, due: Due) -> None:
        """Acts once `done` steps are made, before the last of them is reported; `norm`: of its gradient."""

    def on_report(self, first: int, losses: list[float]) -> None:
        """Acts on the losses of steps `first`, `first` + 1, ..., counted from 0, before they are posted."""

    def on_save(self, done: int, due: Due) -> None:
        """Acts once `done` steps are made and reported, for what reads or keeps the weights. The steps' clock stops."""
