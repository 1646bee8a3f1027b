"""Holds applications on the inference room: a server for models, search over documents, a page to try models.

Start at `serve/front`.
May import: `cluster`, `curation`, `data`, `inference`, `recipes`, `storage`, `tasks`, `tracking`, `training`, `web`.
"""
