"""Scores models on benchmark tasks and on held-out data, and finds evaluation data in the training data.

Start at `run`.
May import: `checkpoint`, `config`, `curation`, `data`, `inference`, `recipes`, `runs`, `storage`, `tasks`, `tracking`.
"""
