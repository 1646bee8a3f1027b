"""Builds the reports: one HTML page about a run, and one about a dataset's curation. Both pages are self-contained."""
