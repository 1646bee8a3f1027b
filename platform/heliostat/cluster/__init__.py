"""Reads cluster files, starts local clusters, connects to clusters, and describes the clusters' nodes.

Start at `cluster_file`.
May import: `config`, `storage`.
"""
