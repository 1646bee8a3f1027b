"""Finds the matrices in a parameter that an optimizer such as Muon orthogonalizes."""

from __future__ import annotations

import math

FILTERS = 4  # dimensions of the filters of a convolution


def sides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns how many matrices a parameter contains, and their rows and columns. A parameter of experts [experts, rows, columns]
    is a stack of matrices. The filters of a convolution [outputs, inputs, height, width] are one matrix with a row per output."""
    if len(shape) == FILTERS:
        return 1, shape[0], math.prod(shape[1:])
    *stacked, rows, columns = shape
    return math.prod(stacked), rows, columns
