"""Shards a model's computation by samples, matrices, or experts. Checks which architectures support this sharding.

Start at `division`. May import: `checkpoint`, `config`, `data`.
"""
