"""Exports models, generates answers to prompts, and runs models over datasets.

Start at `export`.
May import: `checkpoint`, `cluster`, `config`, `curation`, `data`, `optim`, `recipes`, `storage`, `tasks`.
"""
