"""Injects faults into runs on purpose, and measures what each fault costs.

Start at `experiment`.
May import: `checkpoint`, `cluster`, `config`, `runs`, `storage`, `tracking`, `validation`.
"""
