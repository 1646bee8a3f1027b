"""Imports the modules of training workers, in the process from which workers are forked (`cluster.fork_server`)."""

import heliostat.training.worker.build  # noqa: F401
from heliostat.engine import deepspeed_engine

deepspeed_engine.prepare_environment(0)
