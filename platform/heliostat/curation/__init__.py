"""Curates text at any scale: documents go through a list of stages, and each leaves with a reason or goes on to the shards."""
