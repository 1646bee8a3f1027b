"""Injects faults into runs on purpose, and measures what each costs.

Start at `experiment`.
May import: `checkpoint`, `cluster`, `config`, `runs`, `storage`, `tracking`, `validation`.
"""
