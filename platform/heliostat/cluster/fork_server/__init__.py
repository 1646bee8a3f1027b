"""Forks the workers of a private Ray from one process that has imported the workers' modules. A worker then starts in 30 ms, not
in seconds.

Start at `start`. The fork server runs only on Linux, only with tested versions of Ray, and not if HELIOSTAT_FORK_SERVER is 0. In
all other cases, Ray starts the workers itself. `tests/benchmarks/start.py` measures how much time this saves
(docs/benchmarks/start.md).
"""
