"""Holds the public Python API: the names that `import heliostat` offers, and the exact stream of samples for your own training
loop.

Start at `functions`.
May import: `checkpoint`, `cluster`, `config`, `curation`, `data`, `inference`, `plan`, `recipes`, `runs`, `storage`,
`tracking`, `training`, `validation`.
"""
