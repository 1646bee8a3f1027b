"""Compares losses, gradients, and updates of a job's parallelism configuration with those of a plain torch loop.

Start at `check`.
May import: `checkpoint`, `cluster`, `config`, `data`, `engine`, `parallel`, `recipes`, `runs`, `storage`, `training`,
`validation`.
"""
