"""Shows an uncaught error that a person can fix in one line, below the frames of that person's own code.

Such errors have exit code 2. Nothing else changes: the error itself keeps its traceback and its cause.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from pathlib import Path
from types import TracebackType

from heliostat.errors import HeliostatError

PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"  # every room: a person also calls what the API returns


def install() -> None:
    """Puts the hook before the one that is there, which gets all other errors."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, HeliostatError) and error.exit_code == 2:
            sys.stderr.write(shown(error, trace))
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def shown(error: HeliostatError, trace: TracebackType | None) -> str:
    """Formats an error below the frames that led to heliostat."""
    theirs = list(itertools.takewhile(lambda frame: not frame.filename.startswith(PACKAGE), traceback.extract_tb(trace)))
    head = ["Traceback (most recent call last):\n", *traceback.format_list(theirs)] if theirs else []
    return "".join([*head, f"{type(error).__module__}.{type(error).__qualname__}: {error}\n"])
