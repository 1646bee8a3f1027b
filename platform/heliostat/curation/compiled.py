"""Compiles loops over characters, words, and numbers with Numba.

    from heliostat.curation.compiled import compiled   # in a module of kernels, which callers import in their functions

    @compiled
    def count(codes: np.ndarray, code: int) -> int: ...

A kernel is compiled when it is first called, and cached on the node's disk: in the folder of the module, or in the user's folder
for caches. If neither is writable, each process compiles. Importing Numba takes 0.4 s, so a stage imports its module of kernels
when it processes the first document, and `heliostat check` never imports it.

Numba looks only at the kernel's own file to decide whether the cached code is up to date. But a kernel also depends on other
kernels, and on constants. So the cache's key contains a digest of all modules in the kernel's folder, and of this one.

Numba numbers the files of a cache, and lists them in an index. If two processes compile at once, the index can then list the
machine code of one signature under another, until someone deletes the cache. So each file is named after its signature here.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from heliostat.extras import require
from heliostat.tasks import cpu_time

require("curation", "numba", what="this stage")
with cpu_time.loading():
    from numba import njit
    from numba.core.caching import FunctionCache, IndexDataCacheFile
    from numba.core.dispatcher import Dispatcher

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Returns a function that runs as machine code, and without Python's lock. Integers overflow silently, as in C. The seconds
    of compiling or loading it don't count as those of documents."""
    function.__qualname__ += f"_{_digest(Path(function.__code__.co_filename).parent)}"  # a part of the cache's key
    kernel = njit(nogil=True, error_model="numpy")(function)
    if isinstance(kernel, Dispatcher):  # it isn't if NUMBA_DISABLE_JIT=1
        with suppress(RuntimeError):  # Numba can write to no folder
            cast(Any, kernel)._cache = KernelCache(function)
        cast(Any, kernel).compile = cpu_time.loading()(kernel.compile)
    return cast(F, kernel)


class KernelCache(FunctionCache):
    """Stores the machine code of a kernel. If it can't be stored, for example because the disk is full, the process uses it
    without a cache."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = KernelFiles(locator.get_cache_path(), self._impl.filename_base, locator.get_source_stamp())

    def save_overload(self, signature: object, code: object) -> None:
        with suppress(OSError):
            super().save_overload(signature, code)


class KernelFiles(IndexDataCacheFile):
    """Stores one file per signature and processor. A file that is missing or damaged is written again."""

    def save(self, key: object, code: object) -> None:
        self._save_data(self._name(key), code)

    def load(self, key: object) -> object:
        with suppress(OSError, EOFError, pickle.UnpicklingError):
            return self._load_data(self._name(key))
        return None

    def _name(self, key: object) -> str:
        parts = repr((key, self._source_stamp, self._version))
        return str(self._data_name_pattern.format(number=int(hashlib.sha256(parts.encode()).hexdigest()[:16], 16)))


@lru_cache(maxsize=8)
def _digest(folder: Path) -> str:
    """Returns a digest of a folder's modules, and of this one."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*sorted(folder.glob("*.py")), Path(__file__)))).hexdigest()[:12]


@compiled
def finalized(value: np.uint64) -> np.uint64:
    """Mixes the bits of a 64-bit number (splitmix64's finalizer), like `spill.mixed`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
