"""Sets up all tests: the garbage collector skips their imports, and Ctrl-C reaches the processes that they start."""

import gc
import signal
from collections.abc import Iterator

import pytest

# A shell starts background jobs with SIGINT ignored, and each process passes that on to those that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Skips the imported objects in garbage collections. The tests import a million of them, and each pass over them takes half a
    second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
