"""Handles SIGINT and SIGTERM in the driver as requests to stop: remembers the first one; a second one interrupts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Signals:
    """Catches SIGINT and SIGTERM inside `with Signals() as signals:`; `name` is the first signal's, that of a limit, or None.

    On exit the earlier handlers are restored.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, signal._HANDLER] = {}
        self._by_limit = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere, as in a trial of a sweep, signals are not ours
            self._before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def limit(self, name: str) -> None:
        """Requests a stop because a limit was reached; the first signal that follows does not interrupt yet."""
        if not self.name:
            self.name, self._by_limit = name, True

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.name and not self._by_limit:
            raise KeyboardInterrupt
        self._by_limit = False
        self.name = signal.Signals(number).name
