"""Finds near-duplicates among any number of documents: signatures, candidates, clusters, and the document of each cluster that
stays."""
