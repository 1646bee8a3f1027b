"""Runs sweeps with Ray Tune.

Start at `sweep`.
May import: `checkpoint`, `cluster`, `config`, `recipes`, `runs`, `storage`, `tracking`, `training`, `validation`.
"""
