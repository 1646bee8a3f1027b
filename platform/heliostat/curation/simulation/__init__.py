"""Simulates `data prepare` for an input and a cluster of any size: the real driver, with tasks that take their time and results
from a measured sample.

Start at `simulate`.
"""
