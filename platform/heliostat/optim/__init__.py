"""Defines the optimizers: their keys in a job, their state, and the steps that torch lacks.

Start at `optimizers`.
May import: no other room.
"""
