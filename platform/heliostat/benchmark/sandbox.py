"""Holds lm-eval to what is safe and quiet while it works: templates in a sandbox, nothing on standard output, no processes.

A task file's templates are Jinja's, which can reach any Python object, and so run anything, unless they are sandboxed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

LOGGERS = ("lm_eval", "datasets", "evaluate", "transformers")


@contextlib.contextmanager
def held(show: bool) -> Iterator[None]:
    """Holds lm-eval within the context; its progress goes to standard error if it is to `show`, else nowhere."""
    from lm_eval import utils

    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        sink = sys.stderr if show else stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        if not show:
            stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(patch.object(utils, "env", _environment(utils.env)))
        stack.enter_context(patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}))  # its bootstrap would fork a pool
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _environment(plain: object) -> object:
    """Makes a sandboxed environment that renders as a plain one does."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters.update(getattr(plain, "filters", {}))
    return made
