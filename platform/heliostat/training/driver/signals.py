"""Handles SIGINT and SIGTERM in the driver as requests to stop. Records the first signal; a second signal interrupts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Signals:
    """Catches SIGINT and SIGTERM inside `with Signals() as signals:`. `name`: the name of the first signal or limit, or None.

    On exit, restores the earlier handlers.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, signal._HANDLER] = {}
        self._by_limit = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # in another thread, as in a trial, signals are the caller's
            self._before = {n: signal.signal(n, self._take) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def limit(self, name: str) -> None:
        """Requests a stop because a limit was reached.

        The first signal after this request doesn't interrupt at once; the second signal does.
        """
        if not self.name:
            self.name, self._by_limit = name, True

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.name and not self._by_limit:
            raise KeyboardInterrupt
        self._by_limit = False
        self.name = signal.Signals(number).name
