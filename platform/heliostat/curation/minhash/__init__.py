"""Finds near duplicates among any number of documents: signatures, candidates, clusters, and who of a cluster stays."""
