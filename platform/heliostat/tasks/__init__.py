"""Runs resumable tasks on Ray: records each finished task, retries failures, spills and merges tables.

Start at `flow`.
May import: `cluster`, `storage`.
"""
