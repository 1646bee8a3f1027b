"""Lets the wheel be imported where libraries are missing that no piece of work on one GPU uses: Ray, Arrow, MLflow, S3.

What stands in for them can be named, called and derived from, so that modules which import them load; it does nothing. Where a
library is there, it is used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

ASIDE = ("ray", "pyarrow", "mlflow", "boto3", "botocore", "xxhash", "matplotlib", "pathspec", "jsonschema", "aiohttp", "flask")


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __call__(cls, *given: Any, **named: Any) -> Any:
        return Nothing if cls is Nothing else super().__call__(*given, **named)

    def __iter__(cls) -> Any:
        return iter(())

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class Nothing(metaclass=_Anything):
    """Stands for whatever a missing library has."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        made = ModuleType(spec.name)
        made.__getattr__ = lambda name: getattr(Nothing, name)  # type: ignore[method-assign]
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing."""


def missing() -> list[str]:
    """Lists which of the libraries are not installed."""
    return [name for name in ASIDE if sys.modules.get(name, Nothing) is None or find_spec(name) is None]


def stand_in() -> list[str]:
    """Stands in for the libraries that are missing, for the rest of this process; returns which."""
    names = missing()
    for name in names:
        sys.modules.pop(name, None)
    if names:
        sys.meta_path.insert(0, _Finder(set(names)))
    return names
