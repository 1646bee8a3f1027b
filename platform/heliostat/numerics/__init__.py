"""Compares a parallelism configuration's numbers with a plain torch loop.

Start at `check`.
May import: `checkpoint`, `cluster`, `config`, `data`, `engine`, `parallel`, `recipes`, `runs`, `storage`, `training`,
`validation`.
"""
