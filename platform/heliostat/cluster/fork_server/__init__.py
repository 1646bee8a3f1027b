"""Forks the workers of a local private Ray from one process that has imported what they need: 30 ms each instead of seconds.

Start with `start`. Only on Linux, with the Ray versions that it was tested with, and unless HELIOSTAT_FORK_SERVER is 0; otherwise
Ray starts the workers itself. `tests/benchmarks/start.py` measures what it saves (docs/benchmarks/start.md).
"""
