"""Submits jobs to a cluster through the Ray Jobs API, and restarts drivers.

Start at `jobs`.
May import: `cluster`, `config`, `runs`, `storage`, `tracking`, `training`, `tune`, `validation`.
"""
