"""Lets the wheel be imported without libraries that no part on one GPU uses: Ray, Arrow, MLflow, and S3.

Their replacements can be named, called, and derived from, so that modules with these imports load; they do nothing. An installed
library is used itself.
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
    """Replaces every member of a missing library."""


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
    """Lists the libraries that aren't installed."""
    return [name for name in ASIDE if sys.modules.get(name, Nothing) is None or find_spec(name) is None]


def stand_in() -> list[str]:
    """Replaces the missing libraries for the rest of this process; returns their names."""
    names = missing()
    for name in names:
        sys.modules.pop(name, None)
    if names:
        sys.meta_path.insert(0, _Finder(set(names)))
    return names
