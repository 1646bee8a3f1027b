"""Reads cluster files, starts local clusters, connects to clusters, and knows their nodes.

Start at `cluster_file`.
May import: `config`, `storage`.
"""
