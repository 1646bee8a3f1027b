"""Shards a model's computation: samples, matrices, and experts; checks which architectures support it.

Start at `division`.
May import: `checkpoint`, `config`, `data`.
"""
