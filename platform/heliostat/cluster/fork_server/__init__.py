"""Forks the workers of a private Ray from one process that has imported their modules: 30 ms per worker instead of seconds.

Start with `start`. The fork server runs only on Linux, with the versions of Ray that it was tested with, and unless
HELIOSTAT_FORK_SERVER is 0. Otherwise Ray starts the workers itself. `tests/benchmarks/start.py` measures the difference
(docs/benchmarks/start.md).
"""
