"""Defines the states of a run's driver, and which may follow which: `States.to` is the one place where a run changes its state.

starting -> running -> finalizing -> finished      resizing, recovering: from running, until workers make a step again
"""

from __future__ import annotations

import logging
from enum import StrEnum

log = logging.getLogger(__name__)


class RunState(StrEnum):
    """Lists what a run can be at, as its driver sees it; the last three end the command."""

    STARTING = "starting"  # no worker has made a step yet
    RUNNING = "running"  # workers make steps
    RECOVERING = "recovering"  # an attempt has failed, and the next one has made no step yet
    RESIZING = "resizing"  # workers have stopped for another number of them, or for a node that goes; no step since
    FINALIZING = "finalizing"  # all steps are done: the model is exported and registered
    FINISHED = "finished"
    STOPPED = "stopped"  # by a signal, a limit, or a sweep; `--resume` continues
    FAILED = "failed"


S = RunState
ENDS = frozenset({S.FINISHED, S.STOPPED, S.FAILED})
TRAINING = frozenset({S.RUNNING, S.RECOVERING, S.RESIZING, S.FINALIZING, S.STOPPED, S.FAILED})
FOLLOWING: dict[RunState, frozenset[RunState]] = {
    S.STARTING: TRAINING | {S.FINISHED},  # of a command that finds nothing left to do
    S.RUNNING: TRAINING - {S.RUNNING},
    S.RECOVERING: TRAINING,
    S.RESIZING: TRAINING,
    S.FINALIZING: ENDS,
    **dict.fromkeys(ENDS, frozenset()),
}


class States:
    """Holds a run's state."""

    def __init__(self, run: str) -> None:
        self.now, self._run = RunState.STARTING, run

    def to(self, state: RunState) -> None:
        """Changes the state; RuntimeError if it can't follow the present one."""
        if state not in FOLLOWING[self.now]:
            raise RuntimeError(f"run {self._run}: {state} can't follow {self.now}")
        log.debug("run %s: %s -> %s", self._run, self.now, state)
        self.now = state

    def stepped(self) -> None:
        """Notes that workers have made a step."""
        if self.now is not RunState.RUNNING:
            self.to(RunState.RUNNING)
