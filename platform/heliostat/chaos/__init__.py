"""Injects faults into runs on purpose, and measures the cost of each fault.

Start at `experiment`.
May import: `checkpoint`, `cluster`, `config`, `runs`, `storage`, `tracking`, `validation`.
"""
