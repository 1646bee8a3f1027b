"""Finds documents with similar meaning by the cosine similarities of their vectors: k-means cells, and the documents that stay in
each cell."""
