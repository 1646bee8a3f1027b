"""Defines the optimizers: their keys in a job, their state, and the update rules that torch lacks.

Start at `optimizers`.
May import: no other room.
"""
