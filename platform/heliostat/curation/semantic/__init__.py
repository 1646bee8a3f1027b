"""Finds documents with similar meaning by the cosine similarities of their vectors. It assigns documents to k-means cells, and
chooses the documents that stay in each cell."""
