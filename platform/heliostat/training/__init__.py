"""Trains a model: `driver/` runs in the command's process, `worker/` runs in each worker.

Start at `run`.
May import: `checkpoint`, `cluster`, `config`, `data`, `engine`, `inference`, `parallel`, `recipes`, `runs`, `storage`,
`tracking`, `validation`.
"""

AHEAD = ("ray.data", "heliostat.training.worker.preload")
"""Modules that the workers of every run import. A fork server imports them in advance."""
