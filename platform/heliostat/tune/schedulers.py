"""Extends Ray Tune's schedulers, which decide whether a paused trial continues, ends, or clones another trial.

The extended schedulers take the trials of earlier commands into account, and start only as many trials as the cluster has room
for. On resume, ASHA, HyperBand, and median stopping receive the recorded reports in their original order. PBT and PB2 are
synchronous: all trials pause after the same step. Then the worst trials become clones of the best trials, from heliostat's
checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from heliostat.cluster.nodes import Shortage
from heliostat.config.spec import Job
from heliostat.errors import ConfigError, HeliostatError
from heliostat.storage.lease import Lease
from heliostat.training.driver.signals import Signals
from heliostat.tune import pb2
from heliostat.tune import space as spaces
from heliostat.tune.space import Params
from heliostat.tune.sweep import bracket, brackets
from heliostat.tune.trial_record import TrialRecord

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

    from heliostat.tune.state import Result, SweepState

log = logging.getLogger(__name__)

LOOK_S = 1.0  # seconds between two checks of the budget, the lease, and stop requests
GONE_S = 300.0  # seconds to wait for the last trials' actors to end
TRIES = 20  # attempts to find values near the donor's that make a valid job


def make(state: SweepState) -> Within:
    """Creates the sweep's scheduler. The scheduler's `controller` is None until Tune adds the first trial."""
    chosen, steps = state.plan.sweep.scheduler, state.plan.base["train"]["steps"]
    scheduler: Within
    if chosen.halves:
        scheduler = Halving(
            time_attr="step",
            max_t=steps,
            grace_period=chosen.grace or 1,
            reduction_factor=chosen.reduction,
            brackets=brackets(state.plan.sweep, steps),
        )
    elif chosen.name == "median":
        scheduler = Median(time_attr="step", grace_period=chosen.grace or 1, min_samples_required=chosen.min_trials)
    elif chosen.exchanges:
        scheduler = Pb2(state) if chosen.name == "pb2" else Pbt(state)
    else:
        scheduler = Fifo()
    scheduler.watched, scheduler.controller = state, None
    return scheduler


class Within(TrialScheduler):
    """Keeps paused trials waiting while the cluster has no room for their workers."""

    watched: SweepState
    controller: Any  # Tune's controller, of which `Watch` uses private attributes

    def replay(self, records: list[TrialRecord]) -> None:
        """Passes the recorded reports of trials that earlier commands ran to the scheduler, for example to rebuild ASHA's
        rungs."""

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        self.controller = tune_controller
        super().on_trial_add(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        trial = super().choose_trial_to_run(tune_controller)
        paused = trial is not None and trial.status == Trial.PAUSED
        return None if paused and self.watched.busy() >= self.watched.concurrency else trial


class Fifo(Within, FIFOScheduler):
    pass


class Halving(Within, AsyncHyperBandScheduler):
    """Implements ASHA, and asynchronous HyperBand, which is ASHA with several brackets."""

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        plan = self.watched.plan
        number = self.watched.of(trial.trial_id).number
        self._trial_info[trial.trial_id] = self._brackets[bracket(plan.sweep, plan.base["train"]["steps"], number)]  # not random

    def replay(self, records: list[TrialRecord]) -> None:
        """Restores the rungs from the reports of earlier commands' trials."""
        trials = {r.number: cast(Trial, _StandIn(self.watched.plan.name(r.number))) for r in records}
        no_controller = cast("TuneController", None)
        for trial in trials.values():
            self.on_trial_add(no_controller, trial)
        for step, value, record in _in_order(records):
            self.on_trial_result(no_controller, trials[record.number], {"step": step, "value": value})


class Median(Within, MedianStoppingRule):
    def replay(self, records: list[TrialRecord]) -> None:
        """Restores the curves of trials that have ended."""
        trials = {r.number: cast(Trial, _StandIn(self.watched.plan.name(r.number))) for r in records if r.over}
        for step, value, record in _in_order(records):
            if record.number in trials:
                self._results[trials[record.number]].append({"step": step, "value": value})


class _StandIn:
    """Represents a trial of an earlier command. Tune's schedulers get this object instead of Tune's own trial object."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def _in_order(records: list[TrialRecord]) -> list[tuple[int, float, TrialRecord]]:
    reports = [(at, step, value, record) for record in records for step, value, at in record.reports]
    return [(step, value, record) for _, step, value, record in sorted(reports, key=lambda r: r[:2])]


class Pbt(Within, PopulationBasedTraining):
    """Implements PBT with Tune's synchronous scheduler: all trials report the same step before any trial clones another
    trial."""

    def __init__(self, state: SweepState) -> None:
        settings = state.plan.sweep.scheduler
        assert settings.interval
        super().__init__(
            time_attr="step",
            perturbation_interval=settings.interval,
            hyperparam_mutations={"params": {key: [0] for key in state.plan.sweep.space}},  # `_get_new_config` chooses the values
            quantile_fraction=settings.quantile,
            log_config=False,
            require_attrs=False,
            synch=True,
        )
        left = [r for r in state.records.values() if not r.over]
        self._population = (state.plan.trials or 0) - sum(r.over for r in state.records.values())
        if len(left) == self._population:  # a resumed sweep: the slowest trial's next exchange
            self._next_perturbation_sync = (
                min((r.step for r in left), default=0) // settings.interval * settings.interval + settings.interval
            )

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        record = self.watched.of(trial.trial_id)
        if record.reports:  # from an earlier command
            step, value, _ = record.reports[-1]
            own = self._trial_state[trial]
            sign = 1.0 if self._mode == "max" else -1.0
            own.last_score, own.last_train_time, own.last_result = sign * value, step, {"step": step, "value": value}
            own.last_perturbation_time = step

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: Result) -> str:
        self.watched.record_result(trial.trial_id, result)  # Tune's callbacks come later, possibly after the exchange
        own = self._trial_state[trial]
        due = "value" in result and result["step"] - own.last_perturbation_time >= self._perturbation_interval
        if due and len(self._trial_state) < self._population:  # the other trials haven't started, for lack of room
            self._save_trial_state(own, result["step"], result, trial)
            return TrialScheduler.PAUSE
        return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        chosen = super().choose_trial_to_run(tune_controller)
        trials = [t for t in tune_controller.get_trials() if not t.is_finished()]
        waits = len(self._trial_state) >= self._population and all(t.status == Trial.PAUSED for t in trials)
        if chosen is None and trials and waits:  # they wait for a failed trial, or the sweep is stopping
            self._next_perturbation_sync += self._perturbation_interval
            return super().choose_trial_to_run(tune_controller)
        return chosen

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, object], dict[str, object]]:
        record, donor = self.watched.of(trial.trial_id), self.watched.of(trial_to_clone.trial_id)
        step = int(self._trial_state[trial_to_clone].last_train_time)
        rng = np.random.default_rng([self.watched.plan.sweep.searcher.seed, record.number, step])
        params = donor.params
        for near in self._near(donor, step, rng):
            try:
                self.watched.plan.job(record.number, near)
            except ConfigError:
                continue
            params = near
            break
        self.watched.cloned(record, donor, step, params)
        return dict(self.watched.config(record)), {}

    def _near(self, donor: TrialRecord, step: int, rng: np.random.Generator) -> Iterator[Params]:
        """Yields candidate values for a trial that clones the donor at the step. The caller uses the first values that make a
        valid job."""
        sweep = self.watched.plan.sweep
        for _ in range(TRIES):
            yield spaces.explore(sweep.space, donor.params, rng, sweep.scheduler.resample)


class Pb2(Pbt):
    """Implements PB2, which is PBT with another choice of the next values: PB2 chooses the next values with a model of the
    population's gains so far."""

    def _near(self, donor: TrialRecord, step: int, rng: np.random.Generator) -> Iterator[Params]:
        sweep = self.watched.plan.sweep
        records = list(self.watched.records.values())
        if suggested := pb2.suggest(records, donor.number, step, sweep.space, sweep.mode, rng):
            yield suggested
        yield from super()._near(donor, step, rng)


class Watch(Callback):
    """Handles Tune's callbacks: updates the sweep's state, stops the sweep on request, and waits until the last workers end."""

    def __init__(self, state: SweepState, scheduler: Within, signals: Signals, lease: Lease, base: Job) -> None:
        self.state, self.scheduler, self.signals, self.lease = state, scheduler, signals, lease
        self._look_at = 0.0
        self._base, self._idle = base, Shortage(base)

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        return Callback, ()  # Tune pickles its callbacks into a state that heliostat never reads

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        self.state.trials = trials

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        self.state.started(trial.trial_id)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: Result, **info: object) -> None:
        self.state.record_result(trial.trial_id, result)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: object) -> None:
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_S
            self._look()
        if all(t.is_finished() for t in trials):
            self._until_gone()

    def _look(self) -> None:
        self.state.tick()
        self._check_lease()
        if any(t.status == "RUNNING" for t in self.state.trials):  # a running trial reports its own shortage
            self._idle = Shortage(self._base)
        elif self.state.live() and (missing := self._idle.told()):
            log.warning(missing)
        if self.signals.name:
            self.state.stop(self.signals.name)
        try:
            if not self.state.stopping and self.state.folder.join("stop").exists():
                self.state.stop("asked to stop")
        except (HeliostatError, OSError) as e:
            log.warning("can't check for a request to stop the sweep: %s", e)

    def _until_gone(self) -> None:
        """Waits until the actors of the last trials end. Otherwise Tune would kill the actors after a few seconds, and their
        workers would stay alive."""
        manager, deadline = self.scheduler.controller._tune_controller._actor_manager, time.monotonic() + GONE_S
        while manager.num_total_actors and time.monotonic() < deadline:
            manager.next(timeout=0.5)
            self._check_lease()

    def _check_lease(self) -> None:
        if self.lease.lost:  # another driver has taken over the sweep
            raise self.lease.lost
