"""What every unit test is held to."""

import os
import time
from collections.abc import Iterator

import pytest

os.environ["HELIOSTAT_CACHE"] = ""  # a test that changes how models are counted must not meet what was counted before
LOOK_S, LOOKS = 0.02, 10


def _computes() -> bool:
    """Whether a thread of this process computes while this one sleeps."""
    began = time.process_time()
    time.sleep(LOOK_S)
    return time.process_time() - began > LOOK_S / 2


@pytest.fixture(autouse=True, scope="module")
def nothing_computes_on() -> Iterator[None]:
    """Fails a file that leaves a thread which computes for ever: it would halve the speed of all tests after it."""
    yield
    assert not all(_computes() for _ in range(LOOKS)), "a thread that this file has started computes on; end it"
