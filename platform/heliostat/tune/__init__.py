"""Runs sweeps with Ray Tune.

Start at `sweep`.
May import: `checkpoint`, `cluster`, `config`, `recipes`, `runs`, `storage`, `tracking`, `training`, `validation`.
"""

AHEAD = (
    "heliostat.tune.trial",
    "heliostat.training.run",
    "heliostat.training.driver.attempt",
    "heliostat.training.driver.progress",
    "heliostat.tracking.logger",
    "mlflow",
)
"""Modules that a trial imports in addition to the modules of training workers, because each trial is the driver of a run."""
