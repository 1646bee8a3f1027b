"""Imports torch and DeepSpeed as training workers do, and nothing of Ray's, for a zygote of any job (`cluster.zygote_server`)."""

from heliostat.engine import deepspeed_engine, zero_state  # noqa: F401

deepspeed_engine.prepare_environment(0)
