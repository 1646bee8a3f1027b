"""Formats log lines on standard error: on a terminal with the time of day, from the second day on also the date; in a file with
both.
"""

from __future__ import annotations

import logging
import sys
from datetime import date, datetime

from rich.table import Table
from rich.text import Text

from heliostat.redact import Formatter
from heliostat.terminal import console
from heliostat.text import printable

STAMP = "%Y-%m-%d %H:%M:%S"


class LogLines(Formatter):
    """Formats log lines without secrets, and with whatever would move a terminal's cursor escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


class Terminal(logging.Handler):
    """Prints log lines above the live line, if there is one; a long message goes on beside its time, not below it."""

    def __init__(self) -> None:
        super().__init__()
        self.began = datetime.now().date()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            row = Table.grid(padding=(0, 1))
            row.add_column(style="dim", no_wrap=True)
            row.add_column(overflow="fold")
            row.add_row(stamp(datetime.fromtimestamp(record.created), self.began), Text(self.format(record)))
            console.print(row)
        except Exception:  # noqa: BLE001 (as logging's own handlers do: a log line ends no run)
            self.handleError(record)


def start(verbose: bool) -> None:
    """Sends all logs to standard error: warnings of libraries, and heliostat's own from `info` on, or `debug`."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = Terminal()
        handler.setFormatter(LogLines("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(LogLines("%(asctime)s %(message)s", STAMP))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("heliostat").setLevel(logging.DEBUG if verbose else logging.INFO)


def stamp(at: datetime, began: date) -> str:
    """Writes a moment as a terminal shows it: with its date when that is another than the command's first."""
    return at.strftime("%H:%M:%S" if at.date() == began else STAMP)
