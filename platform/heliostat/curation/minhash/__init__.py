"""Finds near-duplicates in any number of documents: signatures, candidates, clusters, and the document that stays in each
cluster."""
