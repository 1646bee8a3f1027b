"""Compiles loops over characters, words, and numbers with Numba.

    from heliostat.curation.compiled import compiled   # in a module of kernels, which callers import in their functions

    @compiled
    def count(codes: np.ndarray, code: int) -> int: ...

A kernel is compiled when it is first called, and cached on the node's disk. Importing Numba takes 0.4 s, so a stage imports its
module of kernels when it processes the first document, and `heliostat check` never imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from heliostat.extras import require

require("curation", "numba", what="this stage")
from numba import njit  # noqa: E402 - after the check of the extra

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Returns a function that runs as machine code, and without Python's lock. Integers overflow silently, as in C."""
    return cast(F, njit(cache=True, nogil=True, error_model="numpy")(function))
