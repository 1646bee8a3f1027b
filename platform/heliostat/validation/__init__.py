"""Checks a complete job against its data, recipe, and cluster before anything starts.

Start at `check`.
May import: `checkpoint`, `cluster`, `config`, `data`, `recipes`, `storage`.
"""
