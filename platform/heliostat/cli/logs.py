"""Log lines on standard error: a time of day on a terminal, with the date from the second day on, date and time in a file."""

from __future__ import annotations

import logging
import sys
from datetime import date, datetime

from rich.logging import RichHandler
from rich.text import Text

from heliostat.redact import Formatter
from heliostat.terminal import console
from heliostat.text import printable

STAMP = "%Y-%m-%d %H:%M:%S"


class Lines(Formatter):
    """Log lines without secrets, and with whatever would move a terminal's cursor escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def start(verbose: bool) -> None:
    """Sends all logs to standard error: warnings of libraries, and heliostat's own from `info` on, or `debug`."""
    handler: logging.Handler
    if sys.stderr.isatty():
        began = datetime.now().date()
        handler = RichHandler(console=console, show_path=False, show_level=False, markup=False,
                              log_time_format=lambda at: Text(stamp(at, began)))  # fmt: skip
        handler.setFormatter(Lines("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(Lines("%(asctime)s %(message)s", STAMP))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("heliostat").setLevel(logging.DEBUG if verbose else logging.INFO)


def stamp(at: datetime, began: date) -> str:
    """A moment as a terminal shows it: with its date when that is another than the command's first."""
    return at.strftime("%H:%M:%S" if at.date() == began else STAMP)
