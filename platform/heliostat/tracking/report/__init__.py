"""Builds the reports: an HTML page about a run, and an HTML page about a dataset's curation. Both pages are self-contained."""
