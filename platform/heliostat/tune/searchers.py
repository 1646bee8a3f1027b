"""Chooses the next trial for Ray Tune from the sweep's records, so that a resumed sweep neither repeats nor loses a trial.

A random trial depends only on the seed and the trial's number, and a grid trial depends only on the trial's number. Optuna gets
the result of every trial that has ended, including those of earlier commands. Tune gets only as many trials as the cluster has
room for. So no trial waits while only some of its workers have a place.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search.search_algorithm import SearchAlgorithm

from heliostat import extras
from heliostat.tune import space as spaces
from heliostat.tune.space import Domain, Params
from heliostat.tune.sweep import Sweep, tell
from heliostat.tune.trial_record import TrialRecord

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from ray.tune.experiment import Trial

    from heliostat.tune.state import SweepState

log = logging.getLogger(__name__)


@dataclass
class Searcher:
    """Chooses the values of trials by random search or grid search, which don't depend on results."""

    sweep: Sweep

    def draw(self, number: int) -> Params | None:
        """Draws a value for every key of the space, for the trial with this number; None if there are no more trials."""
        if self.sweep.searcher.name == "random":
            return spaces.draw(self.sweep.space, self.sweep.searcher.seed, number)
        points = self.points
        return points[number] if number < len(points) else None

    @cached_property
    def points(self) -> list[Params]:
        return spaces.grid(self.sweep.space)

    def observe(self, record: TrialRecord) -> None:
        """Receives the result of a trial that has ended, in this command or in an earlier command."""


def make(sweep: Sweep) -> Searcher:
    return Optuna(sweep) if sweep.searcher.name == "optuna" else Searcher(sweep)


class Optuna(Searcher):
    """Searches with Tune's OptunaSearch (TPE sampler). A trial's values depend on the seed, and on the results so far and their
    order."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep)
        require_optuna()
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {key: _distribution(domain) for key, domain in sweep.space.items()}
        self.search = OptunaSearch(space=self.space, metric="value", mode=sweep.mode, seed=sweep.searcher.seed)
        self._suggested: set[int] = set()

    def draw(self, number: int) -> Params | None:
        self._suggested.add(number)
        return self.search.suggest(str(number))

    def observe(self, record: TrialRecord) -> None:
        failed = record.status == "failed" or record.value is None
        if record.number in self._suggested:
            self.search.on_trial_complete(str(record.number), None if failed else {"value": record.value}, error=failed)
        else:
            self.search.add_evaluated_point(record.drawn, record.value or 0.0, error=failed)


def require_optuna() -> None:
    extras.require("tune", "optuna", what="searcher.name: 'optuna'")


def _distribution(domain: Domain) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if domain.listed:
        return CategoricalDistribution(domain.values)  # type: ignore[arg-type]
    if whole := domain.randint or domain.qrandint:
        return IntDistribution(whole[0], whole[1], step=whole[2] if domain.qrandint else 1)
    low, high, *step = domain.numbers
    if domain.quniform:
        return FloatDistribution(low, high, step=step[0])
    return FloatDistribution(low, high, log="log" in domain.kind)


class Trials(SearchAlgorithm):
    """Supplies trials to Tune while the cluster has room and the budget suffices: first the unfinished trials of earlier
    commands, then new trials."""

    def __init__(self, state: SweepState, searcher: Searcher) -> None:
        self.state, self.searcher = state, searcher
        self._parser = _make_parser()
        self._waiting = [r.number for r in state.records.values() if not r.over]
        for record in state.records.values():
            if record.over:
                searcher.observe(record)
        self._next = max(state.records, default=-1) + 1

    def add_configurations(self, experiments: Any) -> None:
        (self._experiment,) = experiments

    @property
    def total_samples(self) -> int:
        return self.state.plan.trials or 0

    def next_trial(self) -> Trial | None:
        if self._finished or self.state.busy() >= self.state.concurrency:
            return None
        record = None if self.state.stopping else self._record()
        if record is None:
            self._finished = not self.state.live()  # a running trial that ends early frees budget for other trials
            return None
        spec = {**self._experiment.spec, "config": self.state.config(record)}
        name = self.state.plan.name(record.number)
        return _create_trial_from_spec(spec, self._parser, evaluated_params={}, experiment_tag=name, trial_id=name)

    def _record(self) -> TrialRecord | None:
        """Returns the next trial's record; None if there are no more trials, or if the next trial can't start yet."""
        if self._waiting:
            return self.state.records[self._waiting.pop(0)]
        most = self.state.plan.trials
        while (most is None or self._next < most) and self.state.affords_another():
            drawn = self.searcher.draw(self._next)
            if drawn is None:
                return None
            record = self.state.add(self._next, drawn)
            self._next += 1
            if not record.over:
                return record
            log.warning("trial %d isn't a valid job (%s): %s", record.number, tell(record.params), record.reason)
            self.searcher.observe(record)
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, object] | None = None, error: bool = False) -> None:
        record = self.state.ended(trial_id, error)
        if record.over:
            self.searcher.observe(record)
