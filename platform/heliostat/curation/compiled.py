"""Compiles loops over characters, words, and numbers with Numba.

    from heliostat.curation.compiled import compiled   # in a module of kernels, which callers import in their functions

    @compiled
    def count(codes: np.ndarray, code: int) -> int: ...

A kernel is compiled when it is first called, and cached on the node's disk: in the folder of the module, or in the user's folder
for caches. If neither is writable, each process compiles. Importing Numba takes 0.4 s, so a stage imports its module of kernels
when it processes the first document, and `heliostat check` never imports it.

Numba looks only at the kernel's own file to decide whether the cached code is up to date. But a kernel also depends on other
kernels, and on constants. So the cache's key contains a digest of all modules in the kernel's folder, and of those that all
folders share.

Numba numbers the files of a cache, and lists them in an index. If two processes compile at once, the index can then list the
machine code of one signature under another, until someone deletes the cache. So each file is named after its signature here.

To compile all kernels of the text filters takes 8 to 12 CPU seconds and 300 MB. So one process of a machine compiles, while the
others wait for its files (`CompileLock`).
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from heliostat.curation.machine_code import modules_digest
from heliostat.extras import require
from heliostat.storage import local_files
from heliostat.tasks import cpu_time

require("curation", "numba", what="this stage")


class _Hiding(MetaPathFinder):
    def __init__(self, name: str) -> None:
        self.name, self.thread = name, threading.get_ident()

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == self.name and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Hides a module from the imports in the block, unless the process has already imported the module. Other threads can import
    it meanwhile."""
    hiding = _Hiding(name)
    sys.meta_path.insert(0, hiding)
    try:
        yield
    finally:
        sys.meta_path.remove(hiding)


with cpu_time.loading(), _hidden("scipy"), suppress(ImportError):
    import numba.np.arraymath  # noqa: F401 - imports SciPy in 0.16 s, only to choose how it computes convolutions
with cpu_time.loading():
    from numba import njit
    from numba.core.caching import FunctionCache, IndexDataCacheFile
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.dispatcher import Dispatcher

F = TypeVar("F", bound=Callable[..., Any])
WAIT_S = 60.0  # seconds that a process waits while another one compiles
LOOK_S = 0.1  # seconds between looks for the other process' file
log = logging.getLogger(__name__)


def compiled(function: F) -> F:
    """Returns a function that runs as machine code, and without Python's lock. Integers overflow silently, as in C. The seconds
    of compiling or loading it don't count as those of documents."""
    function.__qualname__ += f"_{modules_digest(Path(function.__code__.co_filename).parent)}"  # a part of the cache's key
    kernel = njit(nogil=True, error_model="numpy")(function)
    if isinstance(kernel, Dispatcher):  # it isn't if NUMBA_DISABLE_JIT=1
        with suppress(RuntimeError):  # Numba can write to no folder
            cast(Any, kernel)._cache = KernelCache(function)
        cast(Any, kernel).compile = _locked(kernel.compile)
    return cast(F, kernel)


def _locked(compile: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps Numba's function that loads or compiles a kernel, and first all kernels that this kernel calls."""

    def run(*arguments: Any) -> Any:
        with global_compiler_lock, cpu_time.loading(), _LOCK:
            return compile(*arguments)

    return run


class CompileLock:
    """Holds a lock from the first kernel that isn't cached until the outermost kernel is compiled.

    The operating system releases the lock of a process that dies. A process that can't take the lock within WAIT_S seconds
    compiles without it, now and later.
    """

    def __init__(self) -> None:
        self.depth, self.passed, self.wait_s, self.until, self.stack = 0, False, WAIT_S, 0.0, ExitStack()

    def __enter__(self) -> None:
        self.until = self.until if self.depth else time.monotonic() + self.wait_s
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if not self.depth:
            self.passed = False
            self.stack.close()

    def take(self, file: Path) -> None:
        """Takes the lock of a file. If another process has the lock, waits LOOK_S seconds. `passed` is true when this process may
        compile."""
        try:
            self.stack.enter_context(local_files.alone(file, 0.0))
            self.passed = True
        except BlockingIOError:
            if time.monotonic() > self.until:
                self.passed, self.wait_s = True, 0.0
            else:
                time.sleep(LOOK_S)
        except OSError:  # no file can be locked
            self.passed = True


_LOCK = CompileLock()


class KernelCache(FunctionCache):
    """Stores the machine code of a kernel. If it can't be stored, for example because the disk is full, the process uses it
    without a cache."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = KernelFiles(locator.get_cache_path(), self._impl.filename_base, locator.get_source_stamp())
        folder = hashlib.sha256(locator.get_cache_path().encode()).hexdigest()[:12]
        self._lock_file = local_files.cache("compiled") / folder

    def load_overload(self, signature: object, context: object) -> object:
        """Loads the machine code. Returns None if this process has to compile the kernel."""
        code = super().load_overload(signature, context)
        while code is None and not _LOCK.passed:
            _LOCK.take(self._lock_file)
            code = super().load_overload(signature, context)  # another process may have compiled it meanwhile
        if code is None:
            _announce()
        return code

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


@lru_cache(maxsize=1)
def _announce() -> None:
    """Logs once that this process compiles."""
    log.info("compiling the text filters: about 10 s, once per machine")


@compiled
def finalized(value: np.uint64) -> np.uint64:
    """Mixes the bits of a 64-bit number (splitmix64's finalizer), like `spill.mixed`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
