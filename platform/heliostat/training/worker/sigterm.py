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

    Call it in the main thread of a worker's process. That thread is inside Ray, so Python's signal handlers would wait; the
    wake-up pipe doesn't wait.
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
