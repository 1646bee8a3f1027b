"""Reads the records in a run's folder: events, ledger, goodput, history, samples; verifies receipts.

Start at `history`.
May import: `checkpoint`, `cluster`, `config`, `data`, `recipes`, `storage`.
"""
