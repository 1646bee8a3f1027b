"""What `ingest.py` compares: one module a contender, each with `batches(task, rank)`, and what they share.

Modules of plain processes give `batches(task, rank)`: the batches of one consumer. Modules whose consumers are Ray actors
also have `RAY = True`, `split(task)`, which makes the dataset and gives each consumer its part, and take that part as a
third argument.
"""
