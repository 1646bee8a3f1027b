"""Finds the workspace, and imports code by name. The workspace is the current folder, with jobs/, pipelines/, and clusters/.

A job or pipeline refers to code by import path, `package.module:Class`. The code belongs to the package
(`heliostat.recipes:CausalLM`) or to the workspace (`jobs.mine:Recipe`). The records of models and runs contain such import paths,
too. heliostat imports code only from installed packages and from the workspace's own folders. It never runs code that came with a
model.
"""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat import extras, text
from heliostat.errors import ConfigError
from heliostat.schema import nearest

if TYPE_CHECKING:
    from heliostat.storage.locations import Location

NAME = re.compile(text.NAME)
BUILT_IN = {  # module of the workspace in earlier versions -> module of the package with the same classes
    "jobs.causal_lm": "heliostat.recipes",
    "jobs.text_to_image": "heliostat.recipes",
    "jobs.autoencoder": "heliostat.recipes",
    "pipelines.text": "heliostat.pipelines",
    "pipelines.images": "heliostat.pipelines",
}
MODEL_FILES = ("heliostat.json", "model_index.json")  # a folder with one of these files is a model's folder


def root() -> Path:
    return Path.cwd()


def pipeline_of(output: Location) -> str:
    """Returns the path of the workspace's pipeline file with this output; "" if there is none."""
    for path in sorted([*root().glob("*.y*ml"), *root().glob("pipelines/*.y*ml")]):
        with suppress(OSError, UnicodeDecodeError):
            written = re.search(r"""^output:[ \t]*["']?([^"'\s#]+)""", path.read_text(encoding="utf-8"), re.MULTILINE)
            if written and output.path in (str(root() / written[1]), written[1].removeprefix("s3://").rstrip("/")):
                return str(path.relative_to(root()))
    return ""


def check_name(field: str, name: object) -> str:
    """Returns the name if it is safe as a part of a path. Otherwise raises a ConfigError that begins with `field`."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"{field}: {name!r} {text.NAME_FAULT}")
    return name


def import_path(field: str, path: str, record: Path | None = None) -> Any:
    """Imports the object at `module.name:Object`. If the import fails, raises a ConfigError that begins with `field`.

    `record`: the folder of the model or run whose record has the path. With `record`, importing code from a model's folder is an
    error.
    """
    module_name, mark, attribute = path.partition(":")
    if not mark or not module_name or not attribute or module_name.startswith("."):
        near = nearest(path, _built_in(field))
        raise ConfigError(f"{field}: {path!r} must have the form package.module:Class{near or '. Correct this path'}")
    if str(root()) not in sys.path:
        sys.path.insert(0, str(root()))
    if module_name in BUILT_IN and not _there(module_name):
        module_name = BUILT_IN[module_name]
    if record is not None:
        _refuse_foreign(field, module_name, record)
    try:
        module = importlib.import_module(module_name)
        target = getattr(module, attribute, None)  # here `heliostat.recipes` imports the module of the class
    except ModuleNotFoundError as e:
        if e.name and (module_name == e.name or module_name.startswith(e.name + ".")):
            here = [f"{f}.{p.stem}" for f in ("jobs", "pipelines") for p in (root() / f).glob("*.py")]
            near = nearest(path, [*here, *_built_in(field)])
            raise ConfigError(f"{field}: no module {module_name!r} in {root()}{near}") from e
        if extra := extras.bringing(e.name or ""):
            raise extras.missing(f"{field}: {path}", extra, str(e.name)) from e
        raise ConfigError(
            f"{field}: {module_name} needs the module {e.name!r}, which isn't installed. Install this module"
        ) from e
    except Exception as e:  # the module may raise anything
        fault = f"{field}: can't import {module_name} ({type(e).__name__}: {text.brief(e)})"
        raise ConfigError(f"{fault}. Use --verbose to see the line with the error") from e
    if target is None:
        own = [n for n, o in vars(module).items() if isinstance(o, type) and o.__module__ == module_name]
        names = list(getattr(module, "__all__", own))
        raise ConfigError(f"{field}: {module_name} has no {attribute!r}{nearest(attribute, names)}")
    return target


def _built_in(field: str) -> list[str]:
    """Lists the import paths of the package's recipes or pipelines, for a field that ends in `recipe` or `pipeline`."""
    package = f"heliostat.{field.rpartition(' ')[2]}s"
    return [f"{package}:{name}" for name in importlib.import_module(package).__all__]


def _refuse_foreign(field: str, module_name: str, record: Path) -> None:
    """Raises ConfigError if importing a module would run code in the record's folder or in a model's folder."""
    for place in _places(module_name):
        for way in () if _installed(place.resolve()) else (place.absolute(), place.resolve()):
            if way.is_relative_to(record.absolute()) or way.is_relative_to(record.resolve()) or _in_model(way):
                raise ConfigError(
                    f"{field}: {module_name!r} is code in the folder of a model or run ({way}), which heliostat "
                    "doesn't run. If you trust this code, copy it to jobs/, and use the copy"
                )


def _there(module_name: str) -> bool:
    """Returns whether a module of a package exists, without importing the module or the package."""
    return len(_places(module_name)) > len(_places(module_name.rpartition(".")[0]))


def _places(module_name: str) -> list[Path]:
    """Lists the files and folders that a module and its parent packages may come from, without importing them."""
    top, *inner = module_name.split(".")
    spec = _find(top)
    if spec is None:
        return []
    search = [Path(base) for base in spec.submodule_search_locations or []]
    places = [*search, *([Path(spec.origin)] if spec.has_location and spec.origin else [])]
    for part in inner:
        base = [place for folder in search for place in (folder / part, folder / part / "__init__.py", *folder.glob(f"{part}.*"))
                 if place.exists()]  # fmt: skip
        search = [place for place in base if place.is_dir()]
        places += base
    return places


def _find(name: str) -> ModuleSpec | None:
    if (loaded := getattr(sys.modules.get(name), "__spec__", None)) is not None:
        return loaded
    specs = (finder.find_spec(name, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)


def _installed(place: Path) -> bool:
    """Returns whether a path is in the standard library or in an installed package."""
    roots = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(place.is_relative_to(root) for root in roots)


def _in_model(place: Path) -> bool:
    """Returns whether a path is inside a model's folder. The search goes up to the entry of `sys.path`."""
    entries = {Path(entry).resolve() for entry in sys.path} | {Path(entry).absolute() for entry in sys.path}
    for folder in (place, *place.parents):
        if folder in entries:
            return False
        if any((folder / mark).is_file() for mark in MODEL_FILES):
            return True
    return False
