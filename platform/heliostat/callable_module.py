"""Makes a module callable as the function of `heliostat.api` that has its name: `heliostat.train(job)`, where `heliostat.train`
is the package of the training loop too, and stays it.

    make_callable(__name__)      # in the module itself
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function()(*args, **options)

    def __reduce__(self) -> Any:  # as other modules are: what names it is sent to workers
        return importlib.import_module, (self.__name__,)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Any:
        return getattr(importlib.import_module("heliostat.api"), self.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    sys.modules[name].__class__ = CallableModule
