"""Trains models: a run's driver, the workers' training loop, checkpoints. `heliostat.train(job)` calls `heliostat.api.train`."""

from heliostat.callable_module import make_callable

make_callable(__name__)
