"""Shards what a model computes: samples, matrices, and experts; checks which architectures support it.

Start at `division`.
May import: `checkpoint`, `config`, `data`.
"""
