"""Shows a pipeline's progress: a live line on a terminal, otherwise a log line from time to time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.text import Text

from heliostat.text import printable

log = logging.getLogger(__name__)

LOG_S = 15.0  # seconds between log lines
SPINNER = 3  # columns of the spinner in front of the live line, and one free column


class PipelineWatch:
    """Shows a pipeline's current work. With `quiet`, it shows nothing."""

    def __init__(self, console: Console, doing: str, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.doing, self.quiet, self.clock, self.logged = printable(doing), quiet, clock, clock()
        self.console = console
        live = console.is_terminal and not quiet
        self._status: Status | None = console.status(Text(self.doing)) if live else None

    def __enter__(self) -> PipelineWatch:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status:
            self._status.stop()

    def show(self, kind: str, line: str) -> None:
        if self._status:
            text = Text(f"{self.doing}: {line}")
            text.truncate(self.console.width - SPINNER, overflow="ellipsis")  # rich wraps it, also with `no_wrap`
            self._status.update(text)
        elif not self.quiet and self.clock() - self.logged >= LOG_S:
            self.logged = self.clock()
            log.info("%s: %s", self.doing, line)
