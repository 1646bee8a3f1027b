"""Forks the workers of a private Ray from one process that has imported their modules: 30 ms per worker instead of seconds.

Start at `start`. The fork server runs only on Linux, only with tested versions of Ray, and not if HELIOSTAT_FORK_SERVER is 0.
In all other cases, Ray starts the workers itself. `tests/benchmarks/start.py` measures the difference
(docs/benchmarks/start.md).
"""
