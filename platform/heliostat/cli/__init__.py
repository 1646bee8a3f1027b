"""Defines the command line: one module per group of commands; `common` and `options` have what commands share.

Start at `main`.
May import: `apps`, `chaos`, `checkpoint`, `cluster`, `config`, `curation`, `data`, `evaluation`, `inference`, `numerics`,
`plan`, `runs`, `storage`, `submit`, `tracking`, `training`, `tune`, `validation`, `web`.
"""
