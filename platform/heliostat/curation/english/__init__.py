"""Splits English text into words like spaCy's blank English pipeline, which the published filters use."""
