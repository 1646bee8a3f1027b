"""Reads what a run leaves in its folder: events, ledger, goodput, history, samples; verifies receipts.

Start at `history`.
May import: `checkpoint`, `cluster`, `config`, `data`, `recipes`, `storage`.
"""
