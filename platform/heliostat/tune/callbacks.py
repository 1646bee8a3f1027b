"""Connects Ray Tune's callbacks to the sweep: keeps its state, stops it on request, and waits until the last workers are gone."""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.tune import Callback

from heliostat.cluster.nodes import Shortage
from heliostat.config.spec import Job
from heliostat.errors import HeliostatError
from heliostat.training.driver.signals import Signals
from heliostat.tune.state import State
from heliostat.tune.trial_record import Claim

log = logging.getLogger(__name__)

LOOK_S = 1.0
GONE_S = 300.0  # for the last trials' workers to go


class Watch(Callback):
    def __init__(self, state: State, scheduler: Any, trials: Any, signals: Signals, claim: Claim, base: Job) -> None:
        self.state, self.scheduler, self.source, self.signals, self.claim = state, scheduler, trials, signals, claim
        self._look_at = 0.0
        self._base, self._idle = base, Shortage(base)

    def __reduce__(self) -> Any:
        return Callback, ()  # Tune pickles its callbacks into a state that nobody reads

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.state.trials = trials

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.state.started(trial.trial_id)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.state.told(trial.trial_id, result)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_S
            self._look()
        if all(t.is_finished() for t in trials):
            self._until_gone()

    def _look(self) -> None:
        self.state.tick()
        self.claim.beat()
        if any(t.status == "RUNNING" for t in self.state.trials):  # it says itself what it waits for
            self._idle = Shortage(self._base)
        elif self.state.live() and (missing := self._idle.told()):
            log.warning(missing)
        if self.signals.name:
            self.state.stop(self.signals.name)
        try:
            if not self.state.stopping and self.state.folder.join("stop").exists():
                self.state.stop("told to stop")
        except (HeliostatError, OSError) as e:
            log.warning("whether the sweep is to stop cannot be seen: %s", e)

    def _until_gone(self) -> None:
        """Waits for the actors of the last trials to end: Tune itself would kill them after seconds, and their workers would
        stay."""
        manager, deadline = self.scheduler.controller._tune_controller._actor_manager, time.monotonic() + GONE_S
        while manager.num_total_actors and time.monotonic() < deadline:
            manager.next(timeout=0.5)
            self.claim.beat()
