"""Saves, loads, verifies, and deletes checkpoints, which store state by parameter.

Start at `layout`.
May import: `config`, `data`, `storage`.
"""
