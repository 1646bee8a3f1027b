"""Adds the log-probabilities of a reference model to a dataset of preferences, for DPO.

Start at `pipeline`.
"""
