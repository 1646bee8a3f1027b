"""The workspace: the folder with jobs/, pipelines/ and clusters/ that a team edits, and how its code is imported.

It is the current folder. A job or pipeline names its code by import path, `jobs.causal_lm:CausalLM`, found from there.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError
from heliostat.schema import nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def root() -> Path:
    return Path.cwd()


def check_name(field: str, name: Any) -> str:
    """The name, if as a part of a path it leads nowhere else; ConfigError that names `field` if it could."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{field}: {name!r} is no name; use up to 100 letters, digits, '.', '_' and '-', with a letter or digit first"
        )
    return name


def import_path(field: str, path: str) -> Any:
    """The object at `module.name:Object`; ConfigError that names `field` if it cannot be had."""
    module_name, mark, attribute = path.partition(":")
    if not mark or not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(f"{field}: {path!r} must look like package.module:Class")
    if str(root()) not in sys.path:
        sys.path.insert(0, str(root()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name and (module_name == e.name or module_name.startswith(e.name + ".")):
            here = [f"{f}.{p.stem}" for f in ("jobs", "pipelines") for p in (root() / f).glob("*.py")]
            raise ConfigError(f"{field}: no module {module_name!r} in {root()}{nearest(module_name, here)}") from e
        raise ConfigError(f"{field}: {module_name} needs the module {e.name!r}, which is not installed") from e
    if not hasattr(module, attribute):
        names = [n for n, o in vars(module).items() if isinstance(o, type) and o.__module__ == module_name]
        raise ConfigError(f"{field}: {module_name} has no {attribute!r}{nearest(attribute, names)}")
    return getattr(module, attribute)
