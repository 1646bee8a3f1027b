"""Reads what a run leaves in its folder: events, ledger, goodput, history, samples; verifies receipts.

Start at `history`.
May import: `checkpoint`, `config`, `data`, `recipes`, `storage`.
"""
