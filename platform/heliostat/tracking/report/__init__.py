"""Builds the reports: self-contained HTML pages, one about a run and one about a dataset's curation."""
