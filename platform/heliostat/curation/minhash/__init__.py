"""Finds near-duplicates in any number of documents. Computes signatures, finds candidates, forms clusters, and chooses the
document that stays in each cluster."""
