"""Defines the job schema, its rules across sections, and the workspace.

Start at `spec`.
May import: `optim`, `storage`.
"""
