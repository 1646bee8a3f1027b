"""Decides what becomes of a trial that waits behind a step, by Ray Tune's schedulers, which also learn of earlier commands'
trials and start no more trials than there is room for.

ASHA, HyperBand and median stopping remember over a resume: the records are replayed to them in the order in which they came. PBT
and PB2 are synchronous: their trials stop behind the same step, and the worst clone the best from our own checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from heliostat.errors import ConfigError
from heliostat.tune import pb2
from heliostat.tune import space as spaces
from heliostat.tune.space import Params
from heliostat.tune.sweep import bracket, brackets
from heliostat.tune.trial_record import Record

if TYPE_CHECKING:
    from heliostat.tune.state import State

TRIES = 20  # at values near the donor's that make a valid job


def make(state: State) -> Any:
    """Creates the sweep's scheduler; its `controller` becomes Tune's own when Tune starts its first trial."""
    given, steps = state.plan.sweep.scheduler, state.plan.base["train"]["steps"]
    scheduler: Any
    if given.halves:
        scheduler = Halving(
            time_attr="step",
            max_t=steps,
            grace_period=given.grace or 1,
            reduction_factor=given.reduction,
            brackets=brackets(state.plan.sweep, steps),
        )
    elif given.name == "median":
        scheduler = Median(time_attr="step", grace_period=given.grace or 1, min_samples_required=given.min_trials)
    elif given.exchanges:
        scheduler = Pb2(state) if given.name == "pb2" else Pbt(state)
    else:
        scheduler = Fifo()
    scheduler.watched, scheduler.controller = state, None
    return scheduler


class Within:
    """Keeps paused trials waiting while there is no room for their workers."""

    watched: State
    controller: Any

    def replay(self, records: list[Record]) -> None:
        """Replays to the scheduler what trials of earlier commands reported."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.controller = tune_controller
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        trial = super().choose_trial_to_run(tune_controller)  # type: ignore[misc]
        paused = trial is not None and trial.status == Trial.PAUSED
        return None if paused and self.watched.busy() >= self.watched.concurrency else trial


class Fifo(Within, FIFOScheduler):
    pass


class Halving(Within, AsyncHyperBandScheduler):
    """Schedules by ASHA, or by HyperBand in its asynchronous form, which is ASHA on several brackets."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        plan = self.watched.plan
        number = self.watched.of(trial.trial_id).number
        self._trial_info[trial.trial_id] = self._brackets[bracket(plan.sweep, plan.base["train"]["steps"], number)]  # not by lot

    def replay(self, records: list[Record]) -> None:
        """Restores the rungs from what trials of earlier commands reported."""
        trials: dict[int, Any] = {r.number: _StandIn(self.watched.plan.name(r.number)) for r in records}
        nobody: Any = None  # in the controller's place
        for trial in trials.values():
            self.on_trial_add(nobody, trial)
        for step, value, record in _in_order(records):
            self.on_trial_result(nobody, trials[record.number], {"step": step, "value": value})


class Median(Within, MedianStoppingRule):
    def replay(self, records: list[Record]) -> None:
        """Replays the curves of trials that are over."""
        trials = {r.number: _StandIn(self.watched.plan.name(r.number)) for r in records if r.over}
        for step, value, record in _in_order(records):
            if record.number in trials:
                self._results[trials[record.number]].append({"step": step, "value": value})


class _StandIn:
    """Stands in for a trial of an earlier command."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def _in_order(records: list[Record]) -> list[tuple[int, float, Record]]:
    found = [(at, step, value, record) for record in records for step, value, at in record.reports]
    return [(step, value, record) for _, step, value, record in sorted(found, key=lambda f: f[:2])]


class Pbt(Within, PopulationBasedTraining):
    """Schedules by Tune's PBT in its synchronous form: the whole population reports the same step before any exchange."""

    def __init__(self, state: State) -> None:
        given = state.plan.sweep.scheduler
        assert given.interval
        super().__init__(
            time_attr="step",
            perturbation_interval=given.interval,
            hyperparam_mutations={"params": {key: [0] for key in state.plan.sweep.space}},  # how, is said in _get_new_config
            quantile_fraction=given.quantile,
            log_config=False,
            require_attrs=False,
            synch=True,
        )
        left = [r for r in state.records.values() if not r.over]
        self._population = (state.plan.trials or 0) - sum(r.over for r in state.records.values())
        if len(left) == self._population:  # a resumed sweep: the slowest trial's next exchange
            self._next_perturbation_sync = (
                min((r.step for r in left), default=0) // given.interval * given.interval + given.interval
            )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        record = self.watched.of(trial.trial_id)
        if record.reports:  # of an earlier command
            step, value, _ = record.reports[-1]
            own = self._trial_state[trial]
            sign = 1.0 if self._mode == "max" else -1.0
            own.last_score, own.last_train_time, own.last_result = sign * value, step, {"step": step, "value": value}
            own.last_perturbation_time = step

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.watched.told(trial.trial_id, result)  # Tune tells its callbacks later, when all may have been exchanged
        own = self._trial_state[trial]
        due = "value" in result and result["step"] - own.last_perturbation_time >= self._perturbation_interval
        if due and len(self._trial_state) < self._population:  # the others have not begun: there was no room
            self._save_trial_state(own, result["step"], result, trial)
            return TrialScheduler.PAUSE
        return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        chosen = super().choose_trial_to_run(tune_controller)
        trials = [t for t in tune_controller.get_trials() if not t.is_finished()]
        waits = len(self._trial_state) >= self._population and all(t.status == Trial.PAUSED for t in trials)
        if chosen is None and trials and waits:  # for one that has failed, or for a sweep that is to stop
            self._next_perturbation_sync += self._perturbation_interval
            return super().choose_trial_to_run(tune_controller)
        return chosen

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
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
        return self.watched.config(record), {}

    def _near(self, donor: Record, step: int, rng: np.random.Generator) -> Iterator[Params]:
        """Yields values for a trial that clones the donor at the step; the later ones are tried where the first make no valid
        job."""
        sweep = self.watched.plan.sweep
        for _ in range(TRIES):
            yield spaces.explore(sweep.space, donor.params, rng, sweep.scheduler.resample)


class Pb2(Pbt):
    """Schedules by PB2: PBT whose next values come from a model of what the population has gained so far."""

    def _near(self, donor: Record, step: int, rng: np.random.Generator) -> Iterator[Params]:
        sweep = self.watched.plan.sweep
        records = list(self.watched.records.values())
        if suggested := pb2.suggest(records, donor.number, step, sweep.space, sweep.mode, rng):
            yield suggested
        yield from super()._near(donor, step, rng)
