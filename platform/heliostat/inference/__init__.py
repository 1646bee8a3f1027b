"""Exports models, generates, and runs models over datasets.

Start at `export`.
May import: `checkpoint`, `cluster`, `config`, `curation`, `data`, `recipes`, `storage`, `tasks`.
"""
