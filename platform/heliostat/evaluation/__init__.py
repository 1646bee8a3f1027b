"""Scores models by tasks and by held-out loss, and finds evaluation data in training data.

Start at `run`.
May import: `checkpoint`, `config`, `curation`, `data`, `inference`, `recipes`, `runs`, `storage`, `tasks`, `tracking`.
"""
