"""Reads what a person writes: files of jobs, pipelines, sweeps and clusters."""
