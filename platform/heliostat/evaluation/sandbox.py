"""Restricts lm-eval while it runs. Templates run in a sandbox. lm-eval shows no progress bars and no output, and starts no
processes.

A task file's Jinja templates can reach any Python object, and so run any code, unless they are sandboxed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from jinja2 import Environment

LOGGERS = ("lm_eval", "datasets", "evaluate", "transformers")


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Restricts lm-eval inside the context: templates run in a sandbox, and lm-eval shows no output and starts no processes."""
    from lm_eval import utils
    from tqdm import tqdm

    plain = tqdm.__init__

    def without_bar(self: object, *args: object, **options: object) -> None:
        plain(self, *args, **{**options, "disable": True})

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        stack.enter_context(patch.object(tqdm, "__init__", without_bar))
        stack.enter_context(patch.object(utils, "env", _environment(utils.env)))
        stack.enter_context(
            patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"})
        )  # otherwise, lm-eval's bootstrap forks a process pool
        stack.enter_context(_quiet())
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Limits the libraries' logs to errors inside the context."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _environment(plain: Environment) -> Environment:
    """Returns a sandboxed Jinja environment that renders templates like the environment `plain`."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandboxed = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandboxed.filters.update(plain.filters)
    return sandboxed
