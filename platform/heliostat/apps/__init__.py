"""Contains applications built on `inference`: a model server, document search, and a web page to try models.

Start at `serve/front`.
May import: `cluster`, `curation`, `data`, `inference`, `recipes`, `storage`, `tasks`, `tracking`, `training`, `web`.
"""
