"""Handles SIGTERM in a worker's process as a request for a last checkpoint. The heartbeat reads the event `received`."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from heliostat.data import device_threads

received = threading.Event()  # this process has received SIGTERM


def heed_sigterm() -> None:
    """Handles SIGTERM as a request for a last checkpoint instead of an immediate end.

    Call it in the main thread of a worker's process. Python runs signal handlers in the main thread only, between two bytecodes.
    This thread waits inside Ray, so a handler would run too late. A thread reads the signals from a wake-up pipe instead
    (`signal.set_wakeup_fd`).
    """
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(readable, True)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    signal.signal(signal.SIGTERM, ignore)

    def listen() -> None:
        while numbers := os.read(readable, 64):
            if signal.SIGTERM in numbers:
                received.set()

    device_threads.thread(listen, "sigterm")
