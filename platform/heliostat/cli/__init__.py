"""Defines the command line, with one module per group of commands. `common` and `options` contain code that all groups use.

Start at `main`.
May import: `apps`, `chaos`, `checkpoint`, `cluster`, `config`, `curation`, `data`, `evaluation`, `inference`, `numerics`,
`plan`, `runs`, `storage`, `submit`, `tracking`, `training`, `tune`, `validation`, `web`.
"""
