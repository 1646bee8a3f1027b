"""Finds documents with similar meaning by the cosine similarities of their embedding vectors. Assigns documents to k-means cells,
and chooses the documents that stay in each cell."""
