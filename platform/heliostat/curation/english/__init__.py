"""Splits English text into words as spaCy's blank English pipeline does, whose words the published filters count by."""
