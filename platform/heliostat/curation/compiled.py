"""Compiles loops over characters, words, and numbers with Numba.

    from heliostat.curation.compiled import compiled   # in a module of kernels, which callers import in their functions

    @compiled
    def count(codes: np.ndarray, code: int) -> int: ...

A kernel is compiled when it is first called, and cached on the node's disk: in the folder of the module, or in the user's folder
for caches. If neither is writable, each process compiles. Importing Numba takes 0.4 s, so a stage imports its module of kernels
when it processes the first document, and `heliostat check` never imports it.

Numba looks only at the kernel's own file to decide whether the cached code is up to date. But a kernel also depends on other
kernels, and on constants. So the cache's key contains a digest of all modules in the kernel's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from heliostat.extras import require

require("curation", "numba", what="this stage")
from numba import njit  # noqa: E402 - after the check of the extra

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Returns a function that runs as machine code, and without Python's lock. Integers overflow silently, as in C."""
    function.__qualname__ += f"_{_digest(Path(function.__code__.co_filename).parent)}"  # a part of the cache's key
    try:
        return cast(F, njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # Numba can write to no folder
        return cast(F, njit(nogil=True, error_model="numpy")(function))


@lru_cache(maxsize=8)
def _digest(folder: Path) -> str:
    """Returns a digest of a folder's modules."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:12]
