"""Finds documents that mean much the same by the cosines of their vectors: cells of a k-means, and who of each cell stays."""
