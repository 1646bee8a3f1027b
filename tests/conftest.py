"""Settings for all tests: the garbage collector skips what they import, and Ctrl-C reaches the processes that they start."""

import gc
import signal
from collections.abc import Iterator

import pytest

# A shell starts background jobs with SIGINT ignored, and each process passes that on to those that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collecting the tests imports a million objects. The collector takes half a second for each pass over them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
