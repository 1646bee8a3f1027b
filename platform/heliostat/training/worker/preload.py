"""Imports what training workers need, for the process (`cluster.fork_server`) that they are forked from."""

import heliostat.training.worker.build  # noqa: F401
from heliostat.engine import deepspeed_engine

deepspeed_engine.prepare_environment(0)
