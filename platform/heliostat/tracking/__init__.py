"""Records runs, models, and lineage in MLflow, and draws the report.

Start at `logger`.
May import: `checkpoint`, `cluster`, `config`, `curation`, `data`, `recipes`, `runs`, `storage`, `web`.
"""
