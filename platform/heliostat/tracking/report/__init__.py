"""Builds the report: one self-contained HTML page about a run."""
