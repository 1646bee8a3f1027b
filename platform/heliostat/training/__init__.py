"""Trains: `driver/` runs in the command's process, `worker/` in each worker.

Start at `run`.
May import: `checkpoint`, `cluster`, `config`, `data`, `engine`, `inference`, `recipes`, `runs`, `storage`, `tracking`,
`validation`.
"""
